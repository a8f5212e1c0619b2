"""How everything here is measured: times in turn, the machine's limits, memory in a fresh process.

Nothing in this file knows PyTorch: a process that imports it holds only what the library needs.
PyTorch's steps run in processes of their own. There its threads and its memory are as they are
where nobody else is, and nothing that tinyldm asks of the C library or of BLAS reaches them.
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

from tinyldm.threads import cores, map_threads

SAMPLE_SECONDS = 0.02  # a shorter function is repeated until it takes as long as this
WARM_SECONDS = 0.05  # for which a short function is called before it is measured
LONG_SECONDS = 2.0  # a call that takes as long as this is not made more often than it must
PROC = Path("/proc")

Step = Callable[[], Any]


# -------------------------------------------------------------------------------------------- times


def interleaved(functions: Sequence[Step], rounds: int, wait: Step = lambda: None) -> np.ndarray:
    """Seconds (functions, rounds) of a call, measured in turn: a b c a b c …

    A noisy machine then treats all alike. A short function is called for a while before it is
    measured: the threads of the one before spin on after their work, and the cache holds its data.
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
                _seconds(function, math.ceil(WARM_SECONDS / once[j]), wait)
            times[j, i] = _seconds(function, repeats[j], wait)
    return times


def _seconds(function, repeats, wait):
    if hasattr(function, "seconds"):
        return function.seconds(repeats)
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


# ---------------------------------------------------------------------------------- other processes


class Elsewhere:
    """A step that was prepared in a process of its own, and runs there. Call it for its result."""

    def __init__(self, prepare: Callable[..., Step], *args: Any, preload: str):
        context = _forkserver(preload)
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, prepare, args), daemon=True)
        self._process.start()
        there.close()

    def ask(self, function: Callable, *args: Any) -> Any:
        """`function(step, *args)`, there. A process that has failed ends this one too."""
        self._connection.send((function, args))
        try:
            return self._connection.recv()
        except EOFError:
            raise SystemExit("the process of the other side has failed, see above") from None

    def __call__(self) -> Any:
        return self.ask(_result)

    def seconds(self, repeats: int) -> float:
        """Of a call, measured there."""
        return self.ask(_seconds, repeats, _nothing)

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._process.join()


def _forkserver(preload):
    context = get_context("forkserver")  # which has loaded the module once for all of its processes
    context.set_forkserver_preload([preload])
    return context


def _serve(connection, prepare, args):
    step = prepare(*args)
    with contextlib.suppress(EOFError):
        while True:
            function, args = connection.recv()
            connection.send(function(step, *args))


def _result(step):
    return step()


def _nothing():
    pass


# ----------------------------------------------------------------------------------------- contexts

_entered = contextlib.ExitStack()


def entered(context: contextlib.AbstractContextManager) -> Any:
    """What a `with` block would give, which lasts until `leave`: the processes behind a step."""
    return _entered.enter_context(context)


def leave() -> None:
    """Leave all contexts that were entered."""
    _entered.close()


# ------------------------------------------------------------------------------------------- memory


def apart(function: Callable, *args: Any, preload: str | None = None) -> Any:
    """`function(*args)` in a process of its own, a new one or one that has loaded a module."""
    context = _forkserver(preload) if preload else get_context("spawn")
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
