"""A row of a table: one case beside PyTorch, in both of its memory formats.

The results are compared first. A case has

    name, layouts                             the memory formats in which the rival is tried
    params() → {name: array}
    ours(params, device) → step               a function that is timed
    theirs(params, layout, device) → step     the same in PyTorch
    difference(result of ours, result of theirs) → relative
    least_seconds(limits, their step or None) → what the machine's limits allow, None if unknown

What `theirs` returns holds tensors, or arrays in PyTorch's order where it runs elsewhere.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from bench.measure import (
    Elsewhere,
    Limits,
    Step,
    apart,
    entered,
    interleaved,
    leave,
    resident_memory,
)
from tinyldm.machine import keep_freed_memory

TOLERANCE = 1e-4  # of relative differences in float32

Row = dict[str, str]  # by the title of the column
Rows = Iterator[Row]


@dataclass(frozen=True)
class Run:
    """What every table is given."""

    tiny: bool  # small sizes: does it still run?
    rounds: int
    limits: Limits | None  # None on a GPU, where none are measured
    peer: ModuleType | None  # bench.peer, None without PyTorch and diffusers


def load_peer() -> ModuleType | None:
    """`bench.peer`, or None without PyTorch and diffusers."""
    try:
        from bench import peer
    except ImportError:
        return None
    return peer


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours − theirs| / |theirs|, Euclidean."""
    if ours.shape != theirs.shape:
        raise SystemExit(f"the shapes differ: tinyldm {ours.shape}, PyTorch {theirs.shape}")
    return float(np.linalg.norm((ours - theirs).ravel()) / np.linalg.norm(theirs.ravel()))


def check(name: str, difference: float, tolerance: float = TOLERANCE) -> None:
    """SystemExit for results that differ: a fast wrong answer is not shown."""
    if not difference <= tolerance:  # also where it is not a number
        raise SystemExit(
            f"{name}: the results differ by {difference:.1e}, relative; allowed {tolerance:.0e}"
        )


def ratio_columns(ours: np.ndarray, theirs: dict[str, np.ndarray]) -> tuple[Row, str]:
    """Times (rounds,), theirs by layout → columns, and the layout in which PyTorch is faster."""
    best = min(theirs, key=lambda layout: np.median(theirs[layout]))
    ratios = theirs[best] / ours
    columns = {
        "ratio": f"{np.median(ratios):.2f}",
        "lowest–highest": f"{ratios.min():.2f}–{ratios.max():.2f}",
    }
    return columns, best


def milliseconds(times: np.ndarray) -> str:
    """The median."""
    ms = 1e3 * np.median(times)
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def speed(
    case: Any, run: Run, device: str = "cpu", wait: Step = lambda: None
) -> tuple[Row, str | None]:
    """The columns of a case's times, and the layout in which PyTorch is faster."""
    params = case.params()
    ours = case.ours(params, device)
    layouts = case.layouts if run.peer else ()
    if device == "cpu":
        theirs = {
            layout: entered(Elsewhere(their_step, case, layout, preload="bench.peer"))
            for layout in layouts
        }
    else:
        theirs = {layout: case.theirs(params, layout, device) for layout in layouts}
    del params
    result = ours()
    difference = max((case.difference(result, step()) for step in theirs.values()), default=0.0)
    del result
    check(case.name, difference)
    own, *others = interleaved([ours, *theirs.values()], run.rounds, wait)
    columns = {"case": case.name, "tinyldm ms": milliseconds(own)}
    best = None
    if theirs:
        others = dict(zip(layouts, others, strict=True))
        columns |= {f"PyTorch, {name}": milliseconds(times) for name, times in others.items()}
        ratios, best = ratio_columns(own, others)
        columns |= ratios | {"difference": f"{difference:.0e}"}
    if run.limits:
        least = case.least_seconds(run.limits, theirs.get(best))
        columns["of the limit"] = f"{least / np.median(own):.0%}" if least else "–"
    leave()
    return columns, best


def row(case: Any, run: Run, memory: Callable[[int, int], int]) -> Row:
    """The same, with the memory of a step in a process of its own.

    memory: of (bytes held before the steps, the most held during them), what is shown.
    """
    columns, best = speed(case, run)
    sides = {"MB": apart(resident_memory, our_step, case)}
    if best:
        sides["MB, PyTorch"] = apart(resident_memory, their_step, case, best, preload="bench.peer")
    return columns | {
        side: f"{memory(*held) / 1e6:.0f}" for side, held in sides.items() if held is not None
    }


def our_step(case: Any) -> Step:
    """With parameters of its own, in a process of its own."""
    keep_freed_memory()  # as Pipeline and training do
    return case.ours(case.params(), "cpu")


def their_step(case: Any, layout: str) -> Step:
    """The same of PyTorch. Its results are arrays, in PyTorch's order of axes."""
    from bench import peer

    step = case.theirs(case.params(), layout, "cpu")
    return lambda: peer.to_arrays(step())
