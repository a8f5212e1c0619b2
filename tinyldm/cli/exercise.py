"""`tinyldm exercise`: write a line of the source yourself, and have it checked."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from tinyldm.cli.arguments import one_of, say
from tinyldm.exercises import EXERCISES, NotYet, check
from tinyldm.files import replacing, shown
from tinyldm.options import path_of


def add_arguments(parser: ArgumentParser) -> None:
    """Add the number, the file, and what helps."""
    parser.add_argument(
        "number", metavar="N", type=one_of(range(1, len(EXERCISES) + 1)), nargs="?",
        help=f"1 to {len(EXERCISES)}; without it, all are listed",
    )  # fmt: skip
    parser.add_argument(
        "--file", metavar="FILE",
        help="your answer (default: exercise_N.py here; the first call writes it)",
    )  # fmt: skip
    helps = parser.add_mutually_exclusive_group()
    helps.add_argument(
        "--hints", metavar="K", type=one_of(range(1, 10)), nargs="?", const=1, default=0,
        help="show the first hint, or the first K",
    )  # fmt: skip
    helps.add_argument("--solution", action="store_true", help="show the line as the source has it")


def run(options: Namespace) -> None:
    """List the exercises, write one, or check an answer. Exits with 1 where it is not right."""
    if options.number is None:
        for number, exercise in enumerate(EXERCISES, 1):
            print(f"{number:3}  {exercise.title}")
        return
    exercise = EXERCISES[options.number - 1]
    if options.solution:
        print(exercise.solution)
        return
    if options.hints:
        for hint in exercise.hints[: options.hints]:
            print(f"* {hint}")
        more = len(exercise.hints) - options.hints
        say(f"{more} more: --hints {options.hints + 1}" if more > 0 else "that is all of them")
        return
    file = path_of("--file", options.file or f"exercise_{options.number}.py")
    if not file.exists():
        with replacing(file) as temporary:
            Path(temporary).write_text(exercise.text(options.number), encoding="utf-8")
        print(
            f"{shown(file)}: written; open it, write what stands for `...`, and run this again "
            "(--hints helps)"
        )
        return
    try:
        check(exercise, file)
    except NotYet as error:
        say(f"exercise {options.number}: not yet right\n{error}")
        raise SystemExit(1) from None
    following = options.number + 1
    more = f"; next: tinyldm exercise {following}" if following <= len(EXERCISES) else ""
    print(f"exercise {options.number}: right{more}")
