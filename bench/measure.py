"""How everything here is measured: times in turn, the machine's limits, memory in a fresh process.

Nothing in this file knows PyTorch: a process that imports it holds only what the library needs.
"""

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tinyldm.backend import cores, map_threads

SAMPLE_SECONDS = 0.02  # a shorter function is repeated until it takes as long as this
LONG_SECONDS = 2.0  # a call that takes as long as this is not made more often than it must
PROC = Path("/proc")

Step = Callable[[], Any]


# -------------------------------------------------------------------------------------------- times


def interleaved(functions: Sequence[Step], rounds: int, wait: Step = lambda: None) -> np.ndarray:
    """Seconds (functions, rounds) of a call, measured in turn: a b c a b c …

    A noisy machine then treats all alike. Before each measurement of a short function stands a call
    that is not measured: after its work, the threads of the one before spin on for a while.
    wait: returns once the device has done its work.
    """
    once = [_seconds(function, 1, wait) for function in functions]
    short = [seconds < LONG_SECONDS for seconds in once]
    for j, function in enumerate(functions):
        if short[j]:
            once[j] = _seconds(function, 1, wait)  # without what is loaded or compiled at first
    repeats = [math.ceil(SAMPLE_SECONDS / seconds) for seconds in once]
    times = np.empty((len(functions), rounds))
    for i in range(rounds):
        for j, function in enumerate(functions):
            if short[j]:
                function()
            times[j, i] = _seconds(function, repeats[j], wait)
    return times


def _seconds(function, repeats, wait):
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class Limits:
    """What no program on this machine can exceed, each the best of a few tries."""

    flops: float  # of a float32 matrix product, a second
    bandwidth: float  # bytes a second of a copy on all cores; those read and those written count

    @classmethod
    def measure(cls, side: int, size: int) -> "Limits":
        """side: of the matrices. size: bytes to copy."""
        a = np.ones((side, side), np.float32)
        source = np.ones(size // 4, np.float32)
        target = np.zeros_like(source)
        halves = list(
            zip(np.array_split(target, cores()), np.array_split(source, cores()), strict=True)
        )

        def copy():
            map_threads(lambda pair: np.copyto(*pair), halves)

        product, copied = (
            min(_seconds(f, 1, lambda: None) for _ in range(6)) for f in (lambda: a @ a, copy)
        )
        return cls(2 * side**3 / product, 2 * source.nbytes / copied)

    def __str__(self) -> str:
        return f"SGEMM {self.flops / 1e9:.0f} GF/s, copy {self.bandwidth / 1e9:.1f} GB/s"


# ----------------------------------------------------------------------------------------- contexts

_entered = contextlib.ExitStack()


def entered(context: contextlib.AbstractContextManager) -> Any:
    """What a `with` block would give, which lasts until `leave`: the processes behind a step."""
    return _entered.enter_context(context)


def leave() -> None:
    """Leave all contexts that were entered."""
    _entered.close()


# ------------------------------------------------------------------------------------------- memory


def apart(function: Callable, *args: Any, start: str = "spawn", preload: str | None = None) -> Any:
    """`function(*args)` in a process of its own.

    preload: a module that a "forkserver" has loaded once for all of its processes.
    """
    context = get_context(start)
    if preload:
        context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def resident_memory(prepare: Callable[..., Step], *args: Any) -> tuple[int, int] | None:
    """(bytes held with a step prepared, the most held while it runs twice); None without Linux.

    Call it `apart`. Weights and inputs are in both, what was needed to make them is in neither. Of
    the processes that share the work, what they do not share with the first is added.
    """
    step = prepare(*args)
    gc.collect()
    try:
        for process in ("self", *_children()):
            (PROC / process / "clear_refs").write_text("5")  # forgets the highest so far
    except OSError:
        return None
    before = _kilobytes("self", "status", "VmRSS")
    for _ in range(2):
        step()
    most = _kilobytes("self", "status", "VmHWM")
    for process in _children():
        common = [f"Shared_{state}" for state in ("Clean", "Dirty")]
        most += _kilobytes(process, "status", "VmHWM")
        most -= sum(_kilobytes(process, "smaps_rollup", key) for key in common)
    return 1024 * before, 1024 * most


def _children():
    return (PROC / "self" / "task" / str(os.getpid()) / "children").read_text().split()


def _kilobytes(process, file, key):
    for line in (PROC / process / file).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise KeyError(key)
