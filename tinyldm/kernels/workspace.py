"""Memory for results, aligned to cache lines, and for what is needed only within one function."""

import functools
import itertools
import math
import threading

import numpy as np

from tinyldm.backend import Array, array_module, on_host

# A vector register of 64 bytes that lies across two cache lines costs twice as much to load or
# store, and NumPy aligns its arrays to 16 bytes only.

ALIGNMENT = 64  # bytes
UNALIGNED = 4096  # elements; smaller arrays stay as they come: the call would cost more

_thread = threading.local()


def empty(shape: tuple[int, ...], *like: Array) -> Array:
    """Allocate an array for results of `like`: their device and common dtype, on a cache line.

    Its values are not set.
    """
    dtype = like[0].dtype
    for x in like[1:]:
        dtype = dtype if x.dtype == dtype else np.result_type(dtype, x.dtype)
    size = math.prod(shape)
    if not isinstance(like[0], np.ndarray):
        return array_module(like[0]).empty(shape, dtype)
    if size < UNALIGNED:
        return np.empty(shape, dtype)
    return _aligned(size, dtype).reshape(shape)


def _aligned(size, dtype):
    memory = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size * dtype.itemsize].view(dtype)


def scratch(like: Array, *sizes: int) -> list[Array]:
    """Return flat arrays of these sizes, in memory that this thread uses again and again.

    Valid until the thread asks for scratch again: for use within one function, between two calls
    of others. What is in the cache from the last use need not be fetched from memory.
    """
    if not on_host(like):
        return [array_module(like).empty(size, like.dtype) for size in sizes]
    spans, whole = _layout(sizes, like.itemsize)
    held = getattr(_thread, "memory", None)
    if held is None or held.nbytes < whole:
        held = _thread.memory = _aligned(max(whole, UNALIGNED), np.dtype(np.uint8))
    memory = held[:whole].view(like.dtype)
    return [memory[span] for span in spans]


def scratch_like(x: Array, count: int = 1) -> list[Array]:
    """Return arrays of the shape of x in the memory of `scratch`."""
    return [flat.reshape(x.shape) for flat in scratch(x, *[x.size] * count)]


@functools.lru_cache(maxsize=4096)
def _layout(sizes, itemsize):
    """Place arrays of these sizes one after the other, aligned → their places, bytes of all."""
    step = ALIGNMENT // itemsize
    starts = [0, *itertools.accumulate(-(-size // step) * step for size in sizes)]
    spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    return spans, starts[-1] * itemsize
