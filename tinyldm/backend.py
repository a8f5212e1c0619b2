"""The array switch: NumPy on the CPU, CuPy on the GPU, and the threads of the CPU.

The device follows the data. A function that needs an array library asks the array for it,

    xp = array_module(x)

so there is no global device, and one process can compare both. This is the only file that imports
CuPy, and it does so only when an array is sent to the GPU.
"""

import contextlib
import contextvars
import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import ModuleType
from typing import TypeVar

import numpy as np

Array = np.ndarray  # or cupy.ndarray, which has the same methods
Arrays = TypeVar("Arrays", bound=Array | dict)  # an array, or a dict of arrays

WORKER = "tinyldm-worker"  # how the names of our threads begin, which start no others
AVX512_CORES = ("SkylakeX", "Cooperlake", "SapphireRapids")  # as OpenBLAS calls them

# Arrays of an unlisted library cannot be passed to the layers.
SPECIAL_FUNCTIONS = {"numpy": "scipy.special", "cupy": "cupyx.scipy.special"}


class DeviceError(RuntimeError):
    """The device asked for is not there; the message says why and what to do."""


def array_module(x: Array) -> ModuleType:
    """The library that made the array `x`: `numpy`, or `cupy`."""
    return _module_of(type(x))


@functools.cache
def _module_of(kind):
    return sys.modules[kind.__module__.partition(".")[0]]


def on_host(x: Array) -> bool:
    """Whether `x` lies in the memory of the CPU."""
    return isinstance(x, (np.ndarray, np.generic))


def erf(x: Array) -> Array:
    """The error function, to the last bits of any floating dtype (of complex on the CPU only)."""
    library = SPECIAL_FUNCTIONS[array_module(x).__name__]
    return importlib.import_module(library).erf(x)


def to_device(x: Arrays, device: str) -> Arrays:
    """Copy an array, or a dict of arrays, to `device`: "cpu" or "cuda".

    Raises DeviceError where CuPy or a GPU is missing.
    """
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    if device == "cpu":
        return x if on_host(x) else x.get()
    return _cupy(device).asarray(x)


@functools.cache
def _cupy(device):
    if device != "cuda":
        raise DeviceError(f'device: expected "cpu" or "cuda", found {device!r}')
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            'device "cuda": CuPy is not installed; pip install "tinyldm[cuda12]" (or [cuda13], '
            'whichever your driver is), or use device "cpu"'
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(f'device "cuda": CuPy finds no usable GPU ({error})') from error
    if count == 0:
        raise DeviceError('device "cuda": no GPU is visible to CuPy')
    return cupy


# ---------------------------------------------------------------------------------------- threads
#
# Threads live at one level at a time. Either `map_threads` gives every core a shard of a batch and
# the matrix products inside run on one thread each, which puts all cores on *every* operation; or
# a single call runs and the BLAS library uses the cores inside its matrix products.


def cores() -> int:
    """The number of cores this process may use."""
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
    """Whether BLAS multiplies small matrices without copying them first (OpenBLAS on AVX-512)."""
    return any(
        pool["internal_api"] == "openblas" and pool.get("architecture") in AVX512_CORES
        for pool in _thread_controller().info()
    )


_held = []  # an entry for each `with one_blas_thread()` that is under way


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold the BLAS library to one thread for the length of a `with` block: the cores are taken."""
    with _thread_controller().limit(limits=1, user_api="blas"):
        _held.append(None)
        try:
            yield
        finally:
            _held.pop()


def free_cores() -> int:
    """How many cores an operation may use: all of them, or 1 where others share the work."""
    return 1 if _held else cores()


def only_thread() -> bool:
    """Whether no thread but this one runs, those aside that wait for `map_threads` or for tqdm."""
    mine = threading.current_thread()
    others = (t for t in threading.enumerate() if t is not mine)
    idle = (t.name.startswith(WORKER) or type(t).__name__ == "TMonitor" for t in others)
    return not mine.name.startswith(WORKER) and all(idle)


def map_threads(function: Callable, items: Iterable, workers: int | None = None) -> list:
    """`[function(item) for item in items]`, on all cores, with one BLAS thread each.

    The state of `no_grad` is that of the caller. The order of the results is that of the items. The
    first item that fails raises its exception, once all threads have ended.
    """
    items = list(items)
    workers = min(workers or free_cores(), len(items))
    if workers <= 1 or _held:  # never two levels
        return [function(item) for item in items]
    with one_blas_thread():
        futures = [
            _pool(workers).submit(contextvars.copy_context().run, function, item) for item in items
        ]
        wait(futures)  # all of them, also where one has failed, before the limit is lifted
        return [future.result() for future in futures]


def map_batch(function: Callable[..., Array], *arrays: Array, size: int = 64) -> Array:
    """`function(*arrays)` of a whole batch, in parts of at most `size` on all cores.

    The arrays are cut along their first axis and the results joined along theirs. On a GPU the
    parts follow one another.
    """
    n = len(arrays[0])
    host = on_host(arrays[0])
    count = max(-(-n // size), min(free_cores(), n) if host else 1)
    bounds = [n * i // count for i in range(count + 1)]

    def part(i):
        return function(*(array[bounds[i] : bounds[i + 1]] for array in arrays))

    parts = map_threads(part, range(count)) if host else [part(i) for i in range(count)]
    return parts[0] if count == 1 else array_module(parts[0]).concatenate(parts)


def describe(device: str = "cpu") -> str:
    """One line that says what will do the arithmetic: library, BLAS and its core, threads.

    Raises DeviceError where `device` is not there.
    """
    if device != "cpu":
        cupy = _cupy(device)
        name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        return f"CuPy {cupy.__version__} on {name}"
    blas = [pool for pool in _thread_controller().info() if pool["user_api"] == "blas"]
    libraries = " + ".join(
        dict.fromkeys(f"{p['internal_api']} {p['version']} ({p.get('architecture')})" for p in blas)
    )
    return f"NumPy {np.__version__}, {libraries or 'unknown BLAS'}, {cores()} threads"


def gpus() -> list[str]:
    """The GPUs that CuPy sees, a line each. Raises DeviceError where there is none."""
    runtime = _cupy("cuda").cuda.runtime
    version = runtime.driverGetVersion()
    driver = f"driver for CUDA {version // 1000}.{version % 1000 // 10}"
    lines = []
    for i in range(runtime.getDeviceCount()):
        with _cupy("cuda").cuda.Device(i):
            free, total = runtime.memGetInfo()
        name = runtime.getDeviceProperties(i)["name"].decode()
        lines.append(f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {driver}")
    return lines
