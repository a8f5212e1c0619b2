"""Work cut into blocks that fit the cache of a core.

A pass over a large array waits for memory. A few passes over one block of it, while that lies in
the cache, are far cheaper than the same passes over the whole, one after the other. In training
each core has its own share of the batch; where a single image leaves cores without work, the blocks
of an operation are dealt out to them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np

from tinyldm.backend import Array, on_host
from tinyldm.threads import free_cores, map_threads, spans

# Elements of one array that a memory-bound loop touches at a time: 512 KiB of float32. With fewer,
# calls would take as long as their work; more would no longer lie in the cache.
BLOCK = 2**17
ROW = 2**11  # elements of a row that is long enough for one call of a loop
BUFFER = 2**9  # elements; rows as long are not copied, see `whole_rows`
WORTH_WIDE = 2**16  # elements; for fewer, preparing long rows takes longer than it saves
WORTH_THREADS = 2**20  # elements; for fewer, waking a thread takes too long


def cache_blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Cut arrays of equal length into aligned runs of rows that fit the cache together.

    On a GPU there is one block: kernels stream, and each launch costs.
    """
    rows = arrays[0].shape[0]
    size = max(1, math.prod(arrays[0].shape[1:]))
    step = _rows_of(BLOCK, size) if on_host(arrays[0]) else max(1, rows)
    for start in range(0, rows, step):
        yield tuple(array[start : start + step] for array in arrays)


def _rows_of(budget, size):
    """Return how many rows of `size` fit into a budget: at least one, and many in sixteens.

    So `wide_rows` can join them.
    """
    rows = max(1, budget // size)
    return rows - rows % 16 if rows > 16 else rows


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


def row_blocks(x: Array) -> tuple[list[slice], list[slice]]:
    """Cut x (n, rows, d) along its first axis or, where one sample is too large, the second too.

    → (samples, rows); any of both together fit the cache. On a GPU there is one of each.
    """
    n, rows, d = x.shape
    if x.size <= BLOCK or not on_host(x):
        return [slice(0, n)], [slice(0, rows)]
    samples = max(1, BLOCK // (rows * d))
    some = rows if rows * d <= BLOCK else _rows_of(BLOCK, d)
    return (
        [slice(i, i + samples) for i in range(0, n, samples)],
        [slice(i, i + some) for i in range(0, rows, some)],
    )


def shares(work: list, size: int, like: Array) -> list[list]:
    """Deal work on `size` elements out to the cores that are free: a run of the list to each.

    There is one run where the work is little, or on a GPU.
    """
    if size < WORTH_THREADS or len(work) == 1 or not on_host(like):
        return [work]
    return [work[span] for span in spans(len(work), min(len(work), free_cores()))]


def on_free_cores(function: Callable, work: list, size: int, like: Array) -> list:
    """Compute `[function(item) for item in work]` on the free cores, dealt out as by `shares`."""
    if len(work) == 1:
        return [function(work[0])]
    dealt = shares(work, size, like)
    if len(dealt) == 1:
        return [function(item) for item in work]
    parts = map_threads(lambda run: [function(item) for item in run], dealt)
    return [result for part in parts for result in part]


def each_block(function: Callable, *arrays: Array) -> list:
    """Apply `function` to each of the arrays' `cache_blocks`, on the cores that are free."""
    if arrays[0].size <= BLOCK:
        return [function(*arrays)]
    cut = list(cache_blocks(*arrays))
    return on_free_cores(lambda block: function(*block), cut, arrays[0].size, arrays[0])


def whole_rows(row: int) -> contextlib.AbstractContextManager:
    """Have NumPy read rows of this length where they lie, within a `with` block, if they are long.

    Where rows repeat or are not adjacent, NumPy copies those shorter than its buffer (8192
    elements) into it first, which takes as long as the operation. Rows of fewer than BUFFER
    elements are better copied.
    """
    return contextlib.nullcontext() if row < BUFFER else _short_buffer()


@contextlib.contextmanager
def _short_buffer():
    before = np.setbufsize(BUFFER)
    try:
        yield
    finally:
        np.setbufsize(before)


def wide_rows(x: Array) -> Array:
    """View the rows of a large x (..., p, c) as fewer and longer ones, (..., p / k, k c).

    They have at most ROW elements. NumPy calls a loop for each row, and on a row of 32 channels the
    call takes longest.
    """
    *lead, p, c = x.shape
    k = 1
    while x.size >= WORTH_WIDE and 2 * k * c <= ROW and p % (2 * k) == 0:
        k *= 2
    return x if k == 1 else x.reshape(*lead, p // k, k * c)


def repeated(v: Array, wide: Array) -> Array:
    """Repeat v (..., c) along its last axis for an operation with `wide_rows` (..., k c)."""
    k = wide.shape[-1] // v.shape[-1]
    return v if k == 1 else v[..., None, :].repeat(k, axis=-2).reshape(*v.shape[:-1], -1)


def add_to_rows(x: Array, b: Array) -> None:
    """Add b (c,) to each row of x (..., c), in place."""
    if x.size < WORTH_WIDE or not on_host(x):
        x += b
        return
    wide = wide_rows(x)
    with whole_rows(wide.shape[-1]):
        wide += repeated(b, wide)
