"""Negative controls: faults planted in a backward pass, one at a time, by its syntax tree.

A test of gradients that never fails proves nothing. `assert_detects_faults` compiles the function
again and again, with one small change in its backward pass: a term dropped, a sign flipped, a
factor changed, a transpose or a sum removed. The test must fail on each of these.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType


@dataclass(frozen=True)
class Planted:
    """One change: its line in the function's file, the source before, and the source after."""

    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.before}  →  {self.after}"


def assert_detects_faults(f: Callable, test: Callable[[Callable], object]) -> int:
    """Check that `test(f)` passes, and fails for every fault planted in f's backward pass.

    f: a function written with `def`, whose backward pass is a function or lambda inside it.
    test: is given f, or a faulty copy of it; it fails by raising any exception. Returns how many
    faults were planted. Raises AssertionError, which lists those that were not detected: a fault
    among them may be none, as a factor of what is zero.
    """
    __tracebackhide__ = True
    test(f)
    survivors, count = [], 0
    for planted, faulty in faulty_copies(f):
        count += 1
        try:
            test(faulty)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # as that of pytest.fail
            continue
        survivors.append(planted)
    if not count:
        raise ValueError(f"{f.__name__}: no backward pass to plant a fault in was found inside it")
    if survivors:
        lines = "\n".join(f"  {planted}" for planted in survivors)
        raise AssertionError(
            f"{len(survivors)} of {count} faults planted in {f.__name__} are not detected:\n{lines}"
        )
    return count


def faulty_copies(f: Callable) -> Iterator[tuple[Planted, Callable]]:
    """Yield, for each fault, what was changed and the function with it."""
    plain = inspect.unwrap(f)
    lines, first = inspect.getsourcelines(plain)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise ValueError(f"{plain.__name__}: expected a function written with def")
    definition.decorator_list = []
    for planted, changed in mutants(tree, inner_functions(definition)):
        yield (
            Planted(first + planted.line - 1, planted.before, planted.after),
            _compiled(changed(), plain),
        )


def inner_functions(definition: ast.AST) -> list[ast.AST]:
    """List the functions and lambdas inside a function: its backward pass, as a rule."""
    return [
        node
        for node in ast.walk(definition)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not definition
    ]


def mutants(
    tree: ast.Module, within: list[ast.AST]
) -> Iterator[tuple[Planted, Callable[[], ast.Module]]]:
    """Yield the changes that can be made within some nodes, each with what makes a changed tree."""
    inside = {id(node) for part in within for node in ast.walk(part)}
    places = [node for node in ast.walk(tree) if id(node) in inside]
    for node in places:
        for replacement in _replacements(node):
            before, after = ast.unparse(node), ast.unparse(replacement)
            if before != after:
                line = getattr(node, "lineno", 0)
                yield Planted(line, before, after), partial(_changed, tree, node, replacement)


def _changed(tree, node, replacement):
    return ast.fix_missing_locations(copy.deepcopy(tree, {id(node): replacement}))


OPPOSITE = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Gt: ast.Lt, ast.Lt: ast.Gt, ast.GtE: ast.LtE, ast.LtE: ast.GtE, ast.Eq: ast.NotEq,
}  # fmt: skip
TRANSPOSES = ("transpose", "swapaxes")
REDUCTIONS = {"sum": "mean", "mean": "sum", "max": "min", "min": "max"}


def _replacements(node):
    """List what may stand in the place of a node: like it, but wrong."""
    match node:
        case ast.BinOp(left, op, right):
            found = [] if type(op) is ast.MatMult else [left, right]
            if type(op) in OPPOSITE:
                found.append(ast.BinOp(left, OPPOSITE[type(op)](), right))
        case ast.UnaryOp(ast.USub(), operand):
            found = [operand]
        case ast.Compare(left, [op], others) if type(op) in OPPOSITE:
            found = [ast.Compare(left, [OPPOSITE[type(op)]()], others)]
        case ast.Attribute(value, "T"):
            found = [value]
        case ast.Call(ast.Attribute(value, name), args, keywords) if name in REDUCTIONS:
            wrong = ast.Attribute(value, REDUCTIONS[name], ast.Load())
            found = [ast.Call(wrong, args, keywords)]
        case ast.Call(ast.Attribute(value, name), _, _) if name in TRANSPOSES:
            found = [value]
        case ast.Constant(bool()):
            found = [ast.Constant(not node.value)]
        case ast.Constant(int() | float()):
            found = [ast.Constant(2 * node.value if node.value else 1)]
        case ast.AugAssign(target, op, value):
            found = [ast.Assign([target], value)]
            if type(op) in OPPOSITE:
                found.append(ast.AugAssign(target, OPPOSITE[type(op)](), value))
        case ast.Tuple([a, b, *rest], ast.Load()):
            found = [ast.Tuple([b, a, *rest], ast.Load())]
        case _:
            found = []
    return [ast.copy_location(copy.deepcopy(one), node) for one in found]


def _compiled(tree, plain):
    """Compile a changed copy of a function, which sees the same globals and free variables."""
    free = plain.__code__.co_freevars
    body = ast.parse(f"def _outer({', '.join(free)}):\n    return None").body[0]
    body.body = [*copy.deepcopy(tree).body, ast.Return(ast.Name(plain.__name__, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([body], []))
    names = dict(plain.__globals__)
    exec(compile(module, inspect.getsourcefile(plain) or "<faulty>", "exec"), names)
    made: FunctionType = names["_outer"](*(cell.cell_contents for cell in plain.__closure__ or ()))
    made.__defaults__, made.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
    return made
