"""Work cut into pieces that fit the cache of a core.

A pass over a large array waits for memory. A few passes over one piece of it, while that lies in
the cache, are far cheaper than the same passes over the whole, one after the other.
"""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator

import numpy as np

from tinyldm.backend import (
    Array,
    array_module,
    free_cores,
    has_small_products,
    map_threads,
    on_host,
)

# Elements of one array that a memory-bound loop touches at a time: 512 KiB of float32. With fewer,
# calls would take as long as their work; more would no longer lie in the cache.
PIECE = 2**17
WORTH_THREADS = 2**20  # numbers; for less, waking a thread takes too long


def as_rows(x: Array) -> Array:
    """x (..., d) as a matrix (rows, d), without a copy."""
    return x.reshape(-1, x.shape[-1])


def pieces(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Cut arrays of equal length into aligned runs of rows that fit the cache together.

    On a GPU there is one piece: kernels stream, and each launch costs.
    """
    rows = arrays[0].shape[0]
    size = max(1, math.prod(arrays[0].shape[1:]))
    step = max(1, PIECE // size) if on_host(arrays[0]) else max(1, rows)
    for start in range(0, rows, step):
        yield tuple(array[start : start + step] for array in arrays)


def blocks(samples: int, rows: int, row_size: int, budget: float) -> Iterator[tuple[slice, slice]]:
    """Cut samples × rows, each row of `row_size`, into (samples, rows) slices within `budget`.

    A block is a run of whole samples or, where one sample is too large, a run of its rows; it has
    at least one row, whatever the budget.
    """
    whole = int(budget // (row_size * rows))
    if whole >= 1:
        for start in range(0, samples, whole):
            yield slice(start, min(samples, start + whole)), slice(0, rows)
    else:
        some = max(1, int(budget // row_size))
        for sample in range(samples):
            for start in range(0, rows, some):
                yield slice(sample, sample + 1), slice(start, min(rows, start + some))


def runs(x: Array) -> tuple[list[slice], list[slice]]:
    """Cut x (n, rows, d) along its first axis or, where one sample is too large, the second too.

    → (samples, rows); any of both together fit the cache. On a GPU there is one of each.
    """
    n, rows, d = x.shape
    if x.size <= PIECE or not on_host(x):
        return [slice(0, n)], [slice(0, rows)]
    samples = max(1, PIECE // (rows * d))
    some = rows if rows * d <= PIECE else max(1, PIECE // d)
    return (
        [slice(i, i + samples) for i in range(0, n, samples)],
        [slice(i, i + some) for i in range(0, rows, some)],
    )


# ----------------------------------------------------------------------------------- free cores
#
# In training each core has its own share of the batch. Where a single picture leaves cores without
# work, the pieces of an operation are dealt out to them.


def shares(work: list, size: int, like: Array) -> list[list]:
    """Deal work on `size` numbers out to the cores that are free: a run of the list to each.

    There is one run where the work is little, or on a GPU.
    """
    if size < WORTH_THREADS or len(work) == 1 or not on_host(like):
        return [work]
    count = min(len(work), free_cores())
    return [work[len(work) * i // count : len(work) * (i + 1) // count] for i in range(count)]


def on_free_cores(function: Callable, work: list, size: int, like: Array) -> list:
    """`[function(item) for item in work]`, dealt out as by `shares`."""
    if len(work) == 1:
        return [function(work[0])]
    dealt = shares(work, size, like)
    if len(dealt) == 1:
        return [function(item) for item in work]
    parts = map_threads(lambda run: [function(item) for item in run], dealt)
    return [result for part in parts for result in part]


def each_piece(function: Callable, *arrays: Array) -> list:
    """`function` of each of their `pieces`, on the cores that are free."""
    if arrays[0].size <= PIECE:
        return [function(*arrays)]
    cut = list(pieces(*arrays))
    return on_free_cores(lambda piece: function(*piece), cut, arrays[0].size, arrays[0])


# ------------------------------------------------------------------------------------ memory
#
# A vector register of 64 bytes that lies across two cache lines costs twice as much to load or
# store, and NumPy aligns its arrays to 16 bytes only.

ALIGNMENT = 64  # bytes
UNALIGNED = 4096  # numbers; what is smaller is as it comes: the call would cost more

_thread = threading.local()


def empty(shape: tuple[int, ...], *like: Array) -> Array:
    """An array for results of `like`: of their device and common dtype, aligned to cache lines.

    Its numbers are not set.
    """
    dtype = like[0].dtype
    for x in like[1:]:
        dtype = dtype if x.dtype == dtype else np.result_type(dtype, x.dtype)
    size = math.prod(shape)
    if size < UNALIGNED or not on_host(like[0]):
        return array_module(like[0]).empty(shape, dtype)
    return _aligned(size, dtype).reshape(shape)


def _aligned(size, dtype):
    memory = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size * dtype.itemsize].view(dtype)


def scratch(like: Array, *sizes: int) -> list[Array]:
    """Flat arrays of these sizes in memory that this thread uses again and again.

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


@functools.lru_cache(maxsize=4096)
def _layout(sizes, itemsize):
    """Where arrays of these sizes lie one after the other, aligned, and the bytes of all."""
    step = ALIGNMENT // itemsize
    starts = [0, *itertools.accumulate(-(-size // step) * step for size in sizes)]
    spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    return spans, starts[-1] * itemsize


# ---------------------------------------------------------------------------------- matrix products
#
# OpenBLAS copies both matrices into an order of its own before it multiplies them, except where
# m·n·k is at most 10⁶ and the processor has AVX-512. Among many products of middling size those
# copies cost up to half the time, and `matmul` makes any number of smaller ones in one call.

SMALL = 10**6
TILE = (32, 64)  # rows and columns of a small product
PANEL = 2**14  # numbers in a right-hand matrix that stays in the first-level cache, nearly
LEAST_ROWS = 64  # with no more, copying the right-hand matrix takes longest: k is halved
FEW = 256  # rows too few to be worth copying the matrices
STRIPS = (1024, 768)  # columns at a time of a product with very few rows


def product(a: Array, b: Array, out: Array) -> None:
    """out = a b, for a (..., m, k), b (..., k, n), out (..., m, n) with equal leading axes."""
    if a.ndim > 2 and _too_long(*a.shape[-2:], b.shape[-1], a):
        middle = a.shape[-1] // 2
        product(a[..., :middle], b[..., :middle, :], out)
        rest = empty(out.shape, out)
        product(a[..., middle:], b[..., middle:, :], rest)
        out += rest
        return
    if a.ndim == 2 or not _tiled(*a.shape[-2:], b.shape[-1], a):
        array_module(a).matmul(a, b, out=out)
        return
    *lead, m, k = a.shape
    n = b.shape[-1]
    rows, columns = _tile(k, n)
    end = m - m % rows
    b = np.ascontiguousarray(b)  # small products do not like to turn a matrix
    # Cutting an axis in two never copies, so what is written to these views is written to `out`.
    np.matmul(
        a[..., :end, :].reshape(*lead, end // rows, 1, rows, k),
        b.reshape(*lead, 1, k, n // columns, columns).swapaxes(-3, -2),
        out=out[..., :end, :].reshape(*lead, -1, rows, n // columns, columns).swapaxes(-3, -2),
    )
    if end < m:
        np.matmul(a[..., end:, :], b, out=out[..., end:, :])


def _too_long(m, k, n, like):
    """Whether halves of k would be small products, where the whole is none and m is few rows."""
    return (
        m <= LEAST_ROWS
        and n <= TILE[1]
        and TILE[0] // 2 * min(n, TILE[1]) * k > SMALL
        and on_host(like)
        and has_small_products()
    )


def _tile(k, n):
    return TILE[0] if TILE[0] * TILE[1] * k <= SMALL else TILE[0] // 2, min(n, TILE[1])


def _tiled(m, k, n, like):
    rows, columns = _tile(k, n)
    return (
        m * n * k > SMALL >= rows * columns * k
        and (k * n <= PANEL or m <= FEW and k * n <= 8 * PANEL)
        and n % columns == 0
        and on_host(like)
        and has_small_products()
    )


def spread(matrix: Array, x: Array, out: Array) -> None:
    """out = matrix x, for a small matrix (p, q), x (q, n), out (p, n)."""
    n = x.shape[1]
    strip = next((strip for strip in STRIPS if n % strip == 0), STRIPS[0])
    end = n - n % strip if on_host(x) else 0
    if end:
        x_, out_ = (z[:, :end].reshape(len(z), -1, strip).swapaxes(0, 1) for z in (x, out))
        np.matmul(matrix, x_, out=out_)
    if end < n:
        array_module(x).matmul(matrix, x[:, end:], out=out[:, end:])
