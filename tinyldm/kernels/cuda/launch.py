"""Launching the kernels of kernels.cu, which CuPy compiles at the first launch of a process.

They know nothing of strides: arrays that go in are made contiguous before.
"""

import functools
from importlib.resources import files
from types import ModuleType
from typing import Any

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.registry import NEVER

THREADS = 256  # of a block, at most: kernels.cu has the same number
WARP = 32  # threads that run together
BLOCKS = 4096  # of a launch, at most: then each thread computes several numbers
MOST_PARTS, ROWS_OF_A_THREAD = 64, 16  # of a sum: then the parts are added up
SOURCE = files(__package__).joinpath("kernels.cu")
OPTIONS = ("-std=c++17",)


def on_gpu(x: Array, *others: object, **_: object) -> float:
    """Return the cost of a kernel for float32 arrays on a GPU: less than that of any other."""
    dtypes = (getattr(other, "dtype", "float32") for other in others)
    able = not on_host(x) and x.dtype == "float32" and all(dtype == "float32" for dtype in dtypes)
    return -1.0 if able else NEVER


def launch(name: str, grid: tuple[int, ...], block: tuple[int, ...], *args: Any) -> None:
    """Start the kernel `name` on `grid` blocks of `block` threads.

    args: contiguous arrays, the first argument being one; integers are passed as int, real numbers
    as float, and NumPy's as what they are.
    """
    args = tuple(map(_argument, args))
    _function(array_module(args[0]), name)((*grid, 1)[:2], (*block, 1)[:2], args)


def _argument(arg):
    if isinstance(arg, int):
        return np.int32(arg)
    return np.float32(arg) if isinstance(arg, float) else arg


def each(name: str, count: int, *args: Any) -> None:
    """Start a kernel that computes `count` numbers, which is its last argument."""
    if count:
        blocks = min(BLOCKS, -(-count // THREADS))
        launch(name, (blocks,), (THREADS,), *args, np.int64(count))


def each_row(name: str, count: int, width: int, *args: Any) -> None:
    """Start a kernel that computes `count` rows, its last argument, of `width` numbers each."""
    if count and width:
        lanes = min(THREADS, -(-width // WARP) * WARP)
        rows = THREADS // lanes
        launch(name, (min(BLOCKS, -(-count // rows)),), (lanes, rows), *args, count)


def column_sums(x: Array) -> Array:
    """Sum x (rows, c) over its rows → (c,), in two launches where there are many."""
    xp, (rows, c) = array_module(x), x.shape
    lanes = min(WARP, c)
    lines = THREADS // lanes
    parts = min(MOST_PARTS, -(-rows // (lines * ROWS_OF_A_THREAD)))
    sums = xp.empty((parts, c), x.dtype)
    launch("column_sums", (-(-c // lanes), parts), (lanes, lines), x, sums, rows, c)
    return sums[0] if parts == 1 else column_sums(sums)


@functools.cache
def _function(xp: ModuleType, name: str) -> Any:
    return _module(xp).get_function(name)


@functools.cache
def _module(xp):
    return xp.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=OPTIONS)
