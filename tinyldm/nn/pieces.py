"""Work cut into pieces that fit the cache of a core.

A pass over a large array waits for memory. A few passes over one piece of it, while that lies in
the cache, are far cheaper than the same passes over the whole, one after the other.
"""

import math
from collections.abc import Iterator

from tinyldm.backend import Array, on_host

# Elements of one array that a memory-bound loop touches at a time: 256 KiB of float32, so that
# the handful of arrays it works on stays in a core's second-level cache.
PIECE = 2**16


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
