"""Mutants: faults planted in every backward pass, one at a time. Do the tests notice?

`python -m tests.mutants [SECONDS] [SEED]` changes one expression of the syntax tree of a backward
pass, runs the gradient checks of its module, and lists the changes that none of them noticed. One
whose results are equal to the last bit on all inputs of the checks is no fault, and counts apart.
"""

import ast
import hashlib
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "support"))

import backward_checks  # noqa: E402
import gradients  # noqa: E402
from backward_checks import CHECKS, MODULES, SMALL, plant, source_of  # noqa: E402
from forks import each, in_fork  # noqa: E402

from tinyldm.kernels import blocking, plain  # noqa: E402
from tinyldm.testing import diagnosis  # noqa: E402
from tinyldm.testing.contract import at_the_point, gradients_of  # noqa: E402
from tinyldm.testing.faults import Planted, inner_functions, mutants  # noqa: E402

EXPLAINED = {  # (module, change, line of the source) → why it is no fault, though bits differ
    ("tinyldm.kernels.cpu.layer_norm", "1  →  2",
     "dw_db = rstd_.T @ product, np.ones((1, len(x_)), x.dtype) @ dy_"):
        "Two equal rows, of which the first is taken: only rounding differs.",
    **{
        ("tinyldm.kernels.im2col", f"out_w * kh * kw * c_in * x.itemsize  →  {less}",
         "row_bytes = out_w * kh * kw * c_in * x.itemsize"):
            "The size of a block: sums in another order."
        for less in ("x.itemsize", "out_w * kh * kw * c_in / x.itemsize")
    },
    **{
        ("tinyldm.kernels.cpu.winograd", f"dkernels += other  →  dkernels {sign} other",
         "dkernels += other"):
            "Only threads come here, and tests/kernels."
        for sign in ("=", "-=")
    },
}  # fmt: skip
SHARED = ("turned_kernel", "bias_gradient", "weight_gradient", "_weight_gradient", "_scatter")
MOST_SECONDS = 60  # of processor time for the checks of one mutant: longer is noticed, too
KILLED, SURVIVED, EQUAL = "killed", "survived", "equal"


@dataclass(frozen=True)
class Mutant:
    """A change in one module."""

    module: str
    planted: Planted
    tree: Callable[[], ast.Module]  # which is changed

    def __str__(self):
        return f"{self.module}, {self.planted}"

    def key(self):
        """Return the key of EXPLAINED for this change: module, change, line of the source."""
        line = source_of(self.module)[1].splitlines()[self.planted.line - 1]
        return self.module, self.planted.change, line.strip()


def all_mutants(module):
    """The changes of the backward passes, and of what kernels share for theirs."""
    _, source = source_of(module)
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = {id(node) for function in functions for node in inner_functions(function)}
    within = [
        node
        for node in functions
        if ("back" in node.name and id(node) in inner) or node.name in SHARED
    ]
    return [Mutant(module, planted, changed) for planted, changed in mutants(tree, within)]


def passes_as_it_is(module):
    """Return whether the checks of a module pass without a fault."""
    return bool(in_fork(partial(_passes, module, lambda: None), MOST_SECONDS))


def fate(mutant):
    """Run the checks of a mutant, in a process of its own → KILLED, SURVIVED or EQUAL."""
    return in_fork(partial(_fate, mutant), MOST_SECONDS) or KILLED


def _fate(mutant):
    if not _passes(mutant.module, mutant.tree):
        return KILLED
    with plain():
        if mutant.planted.line not in lines_of(mutant.module):
            return SURVIVED  # for no check passes through it
        same = results(mutant.module, mutant.tree()) == results(mutant.module, None)
    return EQUAL if same else SURVIVED


def _passes(module, make):
    """Run the checks of a module, compiled from the tree that `make()` makes → whether all pass."""
    blocking.BLOCK, blocking.WORTH_THREADS, diagnosis.MOST_SECONDS = SMALL, SMALL, 0
    with plain(), np.errstate(all="ignore"):
        for key in MODULES[module]:
            try:
                CHECKS[key](plant(module, make()))
            except Exception:
                return False
    return True


def lines_of(module):
    """The lines of a module that its checks pass through."""
    path, seen = str(source_of(module)[0]), set()

    def trace(frame, *_):
        if frame.f_code.co_filename == path:
            seen.add(frame.f_lineno)
            return trace

    sys.settrace(trace)
    try:
        for key in MODULES[module]:
            CHECKS[key](plant(module))
    finally:
        sys.settrace(None)
    return seen


def results(module, tree):
    """A hash of all that the checks of a module compute."""
    found = hashlib.sha256()

    def record(f, inputs, params=None, **_):
        problem, base = at_the_point(f, inputs, params, None)
        rng = np.random.default_rng(0)
        dy = {path: rng.normal(size=y.shape) for path, y in base.items()}
        for arrays in (base, gradients_of(problem, base, dy)):
            for path, x in sorted(arrays.items()):
                found.update(path.encode() + np.ascontiguousarray(x).tobytes())
        return dict.fromkeys(base, 0.0)

    def see(arrays):
        for x in arrays:
            found.update(np.ascontiguousarray(x).tobytes())

    kept, gradients.check_gradients = gradients.check_gradients, record
    saw, backward_checks.see = backward_checks.see, see
    try:
        for key in MODULES[module]:
            CHECKS[key](plant(module, tree))
    finally:
        gradients.check_gradients, backward_checks.see = kept, saw
    return found.hexdigest()


def run(chosen, say=print):
    """Find the fates of mutants, on all cores → {fate: [mutants]}."""
    fates = {KILLED: [], SURVIVED: [], EQUAL: []}
    modules = list(dict.fromkeys(mutant.module for mutant in chosen))
    broken = [module for module, passes in each(passes_as_it_is, modules) if not passes]
    if broken:
        raise SystemExit(f"{', '.join(broken)}: checks fail without a fault")
    for mutant, one in each(fate, chosen):
        fates[one].append(mutant)
        if one != KILLED:
            say(f"{one}: {mutant} {EXPLAINED.get(mutant.key(), '')}".rstrip())
    return fates


def main() -> None:
    """Print what survives, and the rate."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    chosen = [mutant for module in MODULES for mutant in all_mutants(module)]
    total, begun = len(chosen), time.monotonic()
    if seconds:
        random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0).shuffle(chosen)
        chosen = chosen[: int(seconds * 2)]  # about as many as fit: half a second each on a core
    fates = run(chosen)
    faults = len(fates[KILLED]) + len(fates[SURVIVED])
    print(
        f"{len(chosen)} of {total} mutants in {time.monotonic() - begun:.0f} s: "
        f"{len(fates[KILLED])} killed, {len(fates[SURVIVED])} survived, {len(fates[EQUAL])} equal "
        f"to the last bit; killed of those that are faults: {len(fates[KILLED]) / faults:.1%}"
    )


if __name__ == "__main__":
    main()
