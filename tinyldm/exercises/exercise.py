"""An exercise: a function of this package with one statement left out, and a check of yours.

The function is cut from the source as it is, so an exercise cannot go out of date.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from tinyldm.files import shown
from tinyldm.testing import GradientError

LONGEST = 2**20  # bytes of a reader's file


class NotYet(Exception):
    """An answer is not right, or not there; the message says what to look at."""


@dataclass(frozen=True)
class Exercise:
    """An exercise: what is asked, of which function, and how an answer is checked.

    place: of the statement that is left out, "inner function/what it assigns", or "return". Where
    there are several like it, `which` counts from 0, or from the end.
    check: is given the function that the reader wrote; it raises AssertionError or NotYet.
    """

    title: str
    task: str
    module: str
    function: str
    place: str
    hints: tuple[str, ...]
    check: Callable[[Callable], object]
    which: int = -1

    def text(self, number: int) -> str:
        """Return the file that the reader gets."""
        lines = self.lines
        first, last, short = self.blank
        indent = " " * (len(lines[first]) - len(lines[first].lstrip()))
        lines[first : last + 1] = [f"{indent}{short}  # write this"]
        title = f"Exercise {number}: {self.title}."
        task = textwrap.fill(self.task, 88)
        return (
            f'"""{title}\n\n{task}\n\nWrite what stands for `...`, then run: tinyldm exercise '
            f'{number}\n"""\n\n{self.imports}\n\n\n' + "\n".join(lines) + "\n"
        )

    @property
    def solution(self) -> str:
        """Return the statement that is left out, as it is in the source."""
        first, last, _ = self.blank
        return textwrap.dedent("\n".join(self.lines[first : last + 1]))

    @property
    def source(self) -> Callable:
        """Return the function itself, without what decorates it."""
        found = import_module(self.module)
        for name in self.function.split("."):
            found = getattr(found, name)
        return inspect.unwrap(found)

    @property
    def lines(self) -> list[str]:
        """Return the source of the function, without decorators and docstring."""
        text = textwrap.dedent(inspect.getsource(self.source))
        definition, lines = ast.parse(text).body[0], text.splitlines()
        if ast.get_docstring(definition) is not None:  # which may hold the answer
            first = definition.body[0]
            lines[first.lineno - 1 : first.end_lineno] = []
        return lines[definition.lineno - 1 :]

    @property
    def blank(self) -> tuple[int, int, str]:
        """Return the first and last line that are left out, from 0, and what stands for them."""
        tree = ast.parse("\n".join(self.lines))
        *outer, name = self.place.split("/")
        for function in outer:
            tree = next(
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and node.name == function
            )
        found = []
        for node in ast.walk(tree):
            if (short := _shortened(node, name)) is not None:
                found.append((node.lineno - 1, node.end_lineno - 1, short))
        return sorted(found)[self.which]

    @property
    def imports(self) -> str:
        """Return import statements of the names that the function uses."""
        known = vars(import_module(self.module))
        tree = ast.parse("\n".join(self.lines))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & known.keys()
        modules, names = [], []
        for name in sorted(used - {self.function}):
            if not isinstance(known[name], types.ModuleType):
                names.append(name)
            elif known[name].__name__ == name:
                modules.append(f"import {name}")
            else:
                modules.append(f"import {known[name].__name__} as {name}")
        if names:
            modules.append(f"from {self.module} import {', '.join(names)}")
        return "\n".join(modules)


def _shortened(node, name):
    """Return how a statement is left out, where it is the one of this name, else None."""
    match node:
        case ast.Return() if name == "return":
            return "return ..."
        case ast.Assign([target]) if ast.unparse(target).strip("()") == name:
            return f"{name} = ..."
        case ast.AugAssign(target, op) if ast.unparse(target) == name:
            sign = ast.unparse(ast.BinOp(ast.Name("a"), op, ast.Name("b"))).split()[1]
            return f"{name} {sign}= ..."
        case ast.Expr(ast.Call(function)) if ast.unparse(function) == name:
            return "..."
    return None


def answer(exercise: Exercise, file: Path) -> Callable:
    """Load the function that the reader wrote. Raises NotYet where it cannot be run."""
    if not file.is_file() or file.stat().st_size > LONGEST:
        raise NotYet(f"{shown(file)}: expected a file of Python")
    try:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text, str(file))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise NotYet(f"{shown(file)}, line {line}: {getattr(error, 'msg', error)}") from None
    blanks = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value is Ellipsis
        if not _is_index(tree, node)
    ]
    if blanks:
        raise NotYet(f"{shown(file)}, line {blanks[0]}: still to be written")
    name = exercise.function.split(".")[-1]
    module = types.ModuleType("exercise")
    module.__file__ = str(file)
    try:
        exec(compile(text, str(file), "exec"), module.__dict__)
        return getattr(module, name)
    except AttributeError:
        raise NotYet(f"{shown(file)}: expected a function {name}") from None
    except Exception as error:
        raise NotYet(_where(error, file)) from None


def _is_index(tree, constant):
    """Return whether an ellipsis stands in an index, as in x[..., 0]."""
    indices = (node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript))
    return any(constant is part for index in indices for part in ast.walk(index))


def check(exercise: Exercise, file: Path) -> None:
    """Check the reader's answer. Raises NotYet, which says what is wrong with it."""
    written = answer(exercise, file)
    try:
        with np.errstate(all="ignore"):
            exercise.check(written)
    except (GradientError, NotYet) as error:
        raise NotYet(str(error)) from None
    except Exception as error:
        raise NotYet(_where(error, file)) from None


def _where(error, file):
    """Say what went wrong in the reader's file, and where."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    if line is None and isinstance(error, AssertionError):
        return str(error)
    place = shown(file) if line is None else f"{shown(file)}, line {line}"
    return f"{place}: {type(error).__name__}: {shown(error)}"


def same(found: object, expected: object, what: str, tol: float = 1e-9) -> None:
    """Compare two arrays. Raises NotYet, which shows the worst entry and a factor between them."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        raise NotYet(f"{what}: expected shape {expected.shape}, found {found.shape}")
    apart = abs(found - expected)
    if not (apart <= tol * max(1.0, abs(expected).max(initial=0.0))).all():
        at = np.unravel_index(int(np.nan_to_num(apart, nan=np.inf).argmax()), apart.shape)
        ratio = found / np.where(expected == 0, np.nan, expected)
        factor = ratio.flat[0]
        alike = np.isfinite(factor) and np.allclose(ratio, factor)
        raise NotYet(
            f"{what}: expected {expected[at]:.6g}, found {found[at]:.6g}"
            + (f"\neverywhere {factor:.6g} times what is right" if alike else "")
        )
