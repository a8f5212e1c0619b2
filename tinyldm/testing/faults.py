"""Negative controls: faults planted in a backward pass, one at a time, by its syntax tree.

A test of gradients that never fails proves nothing. `assert_detects_faults` compiles the function
again and again, with one small change in its backward pass: a term dropped, a sign flipped, a
factor changed, a transpose or a sum removed. The test must fail on each of these.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType

import numpy as np


@dataclass(frozen=True)
class Planted:
    """One change: its line in the function's file, the source before, and the source after."""

    line: int
    before: str
    after: str

    @property
    def change(self) -> str:
        """What was there, and what is there now."""
        return f"{self.before}  →  {self.after}"

    def __str__(self) -> str:
        return f"line {self.line}: {self.change}"


def assert_detects_faults(
    f: Callable, test: Callable[[Callable], object], known: Collection[str] = ()
) -> int:
    """Check that `test(f)` passes, and fails for every fault planted in f's backward pass.

    f: a function written with `def`, or a layer with such a `__call__`, whose backward pass is a
    function or lambda inside it. test: is given f, or a faulty copy of it; it fails by raising any
    exception. known: changes that are no faults, as a factor of what is zero, written as here:
    "1  →  2". Returns how many faults were planted. Raises AssertionError, which lists those that
    were not detected.
    """
    __tracebackhide__ = True
    test(f)
    survivors, count = [], 0
    for planted, faulty in faulty_copies(f):
        if planted.change in known:
            continue
        count += 1
        try:
            with np.errstate(all="ignore"):  # a fault may well divide by zero
                test(faulty)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # as that of pytest.fail
            continue
        survivors.append(planted)
    name = getattr(f, "__name__", type(f).__name__)
    if not count:
        raise ValueError(f"{name}: no backward pass to plant a fault in was found inside it")
    if survivors:
        lines = "\n".join(f"  {planted}" for planted in survivors)
        raise AssertionError(
            f"{len(survivors)} of {count} faults planted in {name} are not detected:\n{lines}"
        )
    return count


def faulty_copies(f: Callable) -> Iterator[tuple[Planted, Callable]]:
    """Yield, for each fault, what was changed and the function, or the layer's call, with it."""
    method = f if inspect.isroutine(f) or isinstance(f, type) else f.__call__
    plain = inspect.unwrap(getattr(method, "__func__", method))
    definition = None
    if inspect.isfunction(plain):
        lines, first = inspect.getsourcelines(plain)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        ast.increment_lineno(tree, first - 1)
        definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        name = getattr(f, "__name__", type(f).__name__)
        raise ValueError(f"{name}: expected a function written with def, or a layer with __call__")
    definition.decorator_list = []
    for planted, changed in mutants(tree, inner_functions(definition)):
        faulty = _compiled(changed(), plain)
        layer = getattr(method, "__self__", None)
        yield planted, faulty if layer is None else MethodType(faulty, layer)


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
    inside -= {id(part) for node in ast.walk(tree) for part in _meaningless(node)}
    types = [
        getattr(node, name, None) for node in ast.walk(tree) for name in ("annotation", "returns")
    ]
    inside -= {id(part) for one in types if one is not None for part in ast.walk(one)}
    places = [node for node in ast.walk(tree) if id(node) in inside]
    for node in places:
        for replacement in _replacements(node):
            before, after = ast.unparse(node), ast.unparse(replacement)
            if before != after:
                line = getattr(node, "lineno", 0)
                yield Planted(line, before, after), partial(_changed, tree, node, replacement)


def _changed(tree, node, replacement):
    return ast.fix_missing_locations(copy.deepcopy(tree, {id(node): replacement}))


def _meaningless(node):
    """List what means nothing in a node: the order of axes, classes or choices; `strict`; −1."""
    match node:
        case ast.Call(ast.Attribute(_, name), args, keywords) if name in (*REDUCTIONS, "suppress"):
            found = [*args, *(keyword.value for keyword in keywords)]
        case ast.Call(ast.Name("isinstance"), [_, some]) | ast.ExceptHandler(some):
            found = [some]
        case ast.Compare(_, [ast.In() | ast.NotIn()], found):
            pass
        case ast.keyword("strict", value):
            return [value]
        case ast.Call(ast.Attribute(_, "reshape"), args):  # any negative size is the one left over
            parts = [part for arg in args for part in ast.walk(arg)]
            return [part.operand for part in parts if isinstance(part, ast.UnaryOp)]
        case _:
            found = []
    return [part for part in found if isinstance(part, ast.Tuple)]


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
        case ast.Call(ast.Name(name), [first, *_]) if "back" in name:  # left out
            found = [first]
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
        case ast.Expr(ast.Call()):  # a step that is left out
            found = [ast.Pass()]
        case ast.Assign([ast.Name(name)], ast.Call(args=[ast.Name(first), *_])) if name == first:
            found = [ast.Pass()]
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
