"""The code in the course, put there by a script so that it is never old, and what it prints.

`python -m tests.course` fills every block that follows a comment such as

    <!-- code: diffusion/samplers.py, ddim, from "x0, epsilon =" to "x = math.sqrt" -->

with those lines of that function. Without "from … to …" they are its body, without the docstring.
It then runs the other blocks of Python, one after the other, and writes what each prints into the
block below it.
"""

import ast
import contextlib
import io
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / "tinyldm" / "README.md"
BLOCK = re.compile(
    r'(<!-- code: (\S+), ([\w.]+)(?:, from "([^"]+)" to "([^"]+)")? -->\n```python\n)(.*?)(```)',
    re.DOTALL,
)
RUN = re.compile(r"(```python\n)((?:(?!```).)*)(```\n\n```\n)(?:(?!```).)*(```)", re.DOTALL)


def lines_of(file, name, first=None, last=None):
    """The lines of a function of the package, from the one that holds `first` to that of `last`."""
    text = (ROOT / "tinyldm" / file).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        (node,) = (n for n in ast.walk(node) if getattr(n, "name", None) == part)
    body = node.body[1:] if ast.get_docstring(node) else node.body
    lines = text.splitlines()[body[0].lineno - 1 : node.end_lineno]
    if first:
        (start,) = (i for i, line in enumerate(lines) if first in line)
        stop = next(i for i, line in enumerate(lines) if i >= start and last in line)
        lines = lines[start : stop + 1]
    return textwrap.dedent("\n".join(lines)).strip() + "\n"


def filled(page):
    """The text of a page with its code as the source has it."""
    return BLOCK.sub(lambda m: m[1] + lines_of(m[2], m[3], m[4], m[5]) + m[7], page)


def run(page):
    """The text of a page with what its code prints."""
    names = {"__name__": "course"}

    def printed(match):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(match[2], names)
        return match[1] + match[2] + match[3] + output.getvalue() + match[4]

    return RUN.sub(printed, page)


if __name__ == "__main__":
    COURSE.write_text(run(filled(COURSE.read_text(encoding="utf-8"))), encoding="utf-8")
