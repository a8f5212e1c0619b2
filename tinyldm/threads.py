"""The threads of the CPU, at one level at a time.

Either `map_threads` gives every core a part of the work, and the matrix products inside run on one
thread each, which puts all cores on *every* operation; or a single call runs, and the BLAS library
uses the cores inside its matrix products.
"""

import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from tinyldm.backend import Array, array_module, describe_gpu, on_host

WORKER = "tinyldm-worker"  # how the names of our threads begin, which start no others
AVX512_CORES = ("SkylakeX", "Cooperlake", "SapphireRapids")  # as OpenBLAS calls them


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool(workers):
    return ThreadPoolExecutor(workers, thread_name_prefix=WORKER)


@functools.cache
def _thread_controller():
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@functools.cache
def has_small_products() -> bool:
    """Return whether BLAS multiplies small matrices without copying them (OpenBLAS on AVX-512)."""
    return any(
        pool["internal_api"] == "openblas" and pool.get("architecture") in AVX512_CORES
        for pool in _thread_controller().info()
    )


_held = []  # an entry for each `with sequential()` that is under way


@contextlib.contextmanager
def sequential() -> Iterator[None]:
    """Have `map_threads` do one item after the other in its own thread, within a `with` block."""
    _held.append(None)
    try:
        yield
    finally:
        _held.pop()


def limited_blas() -> contextlib.AbstractContextManager:
    """Hold the BLAS library to one thread for the length of a `with` block."""
    return _thread_controller().limit(limits=1, user_api="blas")


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS and `map_threads` to one thread within a `with` block: the cores are taken."""
    with limited_blas(), sequential():
        yield


def free_cores() -> int:
    """Return how many cores an operation may use: all, or 1 where others share the work."""
    return 1 if _held else cores()


def only_thread() -> bool:
    """Return whether no other thread runs, except those waiting for `map_threads` or for tqdm."""
    mine = threading.current_thread()
    others = (t for t in threading.enumerate() if t is not mine)
    idle = (t.name.startswith(WORKER) or type(t).__name__ == "TMonitor" for t in others)
    return not mine.name.startswith(WORKER) and all(idle)


PATIENCE = 0.1  # seconds


def map_threads(function: Callable, items: Iterable, workers: int | None = None) -> list:
    """Compute `[function(item) for item in items]` on all cores, with one BLAS thread each.

    The state of `no_grad` is that of the caller. The order of the results is that of the items. The
    first item that fails raises its exception, once all threads have ended; so does Ctrl-C.
    """
    items = list(items)
    workers = min(workers or free_cores(), len(items))
    if workers <= 1 or _held:  # never two levels
        return [function(item) for item in items]
    with one_blas_thread():
        futures = []
        try:
            for item in items:
                run = contextvars.copy_context().run
                futures.append(_pool(workers).submit(run, function, item))
            while wait(futures, PATIENCE).not_done:
                pass  # a signal that another thread received is seen here now
        finally:  # also after Ctrl-C: the limit of BLAS is not lifted below a running product
            for future in futures:
                future.cancel()
            wait(futures)
        return [future.result() for future in futures]


def spans(n: int, count: int) -> list[slice]:
    """Cut 0…n into `count` slices of about equal length."""
    bounds = [n * i // count for i in range(count + 1)]
    return list(map(slice, bounds, bounds[1:]))


def map_batch(function: Callable[..., Array], *arrays: Array, size: int = 64) -> Array:
    """Apply `function(*arrays)` to a whole batch, in parts of at most `size` on all cores.

    The arrays are cut along their first axis and the results joined along theirs. On a GPU the
    parts follow one another.
    """
    n = len(arrays[0])
    host = on_host(arrays[0])
    count = max(-(-n // size), min(free_cores(), n) if host else 1)

    def part(span):
        return function(*(array[span] for array in arrays))

    parts = (map_threads if host else map)(part, spans(n, count))
    first, *others = parts
    return array_module(first).concatenate([first, *others]) if others else first


def cut_batch(batch: tuple[Array, ...], count: int) -> list[tuple[float, tuple[Array, ...]]]:
    """Cut into `count` parts (share of the batch, part), or fewer where one would be empty."""
    n = len(batch[0])
    if {len(array) for array in batch} != {n} or n == 0:
        raise ValueError(
            "value_and_grad: expected arrays of one length, at least 1, found "
            f"{[len(array) for array in batch]}"
        )
    return [
        ((span.stop - span.start) / n, tuple(array[span] for array in batch))
        for span in spans(n, min(n, count))
    ]


def describe_device(device: str = "cpu") -> str:
    """Return one line that says what will do the arithmetic: library, BLAS and its core, threads.

    Raises DeviceError where `device` is not there.
    """
    if device != "cpu":
        return describe_gpu()
    blas = [pool for pool in _thread_controller().info() if pool["user_api"] == "blas"]
    libraries = " + ".join(
        dict.fromkeys(f"{p['internal_api']} {p['version']} ({p.get('architecture')})" for p in blas)
    )
    return f"NumPy {np.__version__}, {libraries or 'unknown BLAS'}, {cores()} threads"
