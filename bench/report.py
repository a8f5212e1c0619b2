"""Tables in Markdown, on the screen as they are measured."""

import inspect
from collections.abc import Callable

from bench.compare import Row, Rows, Run

FIRST_COLUMN = 50  # characters; how long its longest text will be is not known at the first row


def write(table: Callable[[Run], Rows], run: Run, say: Callable[[str], None]) -> None:
    """A title and a note from the table's docstring, then its rows. say: takes lines."""
    title, _, note = inspect.getdoc(table).partition("\n\n")
    limits = f"Limits: {run.limits}. " if run.limits else ""
    say(f"\n### {title}\n\n{note}\n\n{limits}{run.rounds} rounds.\n")
    widths = {}
    for row in table(run):
        if not widths:
            widths = {column: max(6, len(column), len(text)) for column, text in row.items()}
            widths[next(iter(row))] = FIRST_COLUMN
            say(_line({column: column for column in widths}, widths))
            say(_line({column: "-" * width for column, width in widths.items()}, widths))
        say(_line(row, widths))


def _line(row: Row, widths: dict[str, int]) -> str:
    return "| " + " | ".join(row.get(c, "–").ljust(width) for c, width in widths.items()) + " |"
