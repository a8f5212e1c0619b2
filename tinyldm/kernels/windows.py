"""Windows of x for the convolution kernels, block by block, and their small gradients."""

from collections.abc import Iterator

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.blocking import blocks as cut_blocks
from tinyldm.kernels.blocking import shares


def cut(
    n: int, rows: int, row_bytes: int, budget: int, like: Array
) -> list[list[tuple[slice, slice]]]:
    """Cut the outputs of n samples into blocks (samples, rows), dealt out to the free cores."""
    budget = budget if on_host(like) else 64 * budget
    size = n * rows * row_bytes // like.itemsize
    return shares(list(cut_blocks(n, rows, row_bytes, budget)), size, like)


def windows(
    x: Array,
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int, int, int],
    out_w: int,
    blocks: list[tuple[slice, slice]],
) -> Iterator[tuple[slice, slice, Array]]:
    """Yield (samples, output rows, windows): the windows of a block's outputs, zeros around x.

    windows [n, y, x, i, j, c] = x[n, y·stride + i − top, x·stride + j − left, c] is a view of a
    buffer that is filled anew for the next block. blocks: (samples, output rows).
    """
    xp = array_module(x)
    n, h, w, c = x.shape
    kh, kw = kernel
    top, _, left, _ = padding
    width = (out_w - 1) * stride + kw  # of x with its padding, as far as windows reach
    left_in, right_in = _inside(width, left, w)
    padded = None
    for ns, hs in blocks:
        samples, rows = ns.stop - ns.start, hs.stop - hs.start
        height = (rows - 1) * stride + kh
        if padded is None or padded.shape[:2] != (samples, height):
            padded = xp.zeros((samples, height, width, c), x.dtype)
            sn, sh, sw, sc = padded.strides
            shape = (samples, rows, out_w, kh, kw, c)
            strides = (sn, sh * stride, sw * stride, sh, sw, sc)
            if on_host(x):  # the same view as by as_strided, made faster
                seen = np.ndarray(shape, x.dtype, padded, 0, strides)
            else:
                seen = xp.lib.stride_tricks.as_strided(padded, shape, strides)
        first = hs.start * stride - top  # the row of x that is the first of `padded`
        top_in, bottom_in = _inside(height, -first, h)
        if top_in:
            padded[:, :top_in] = 0
        if bottom_in < height:
            padded[:, bottom_in:] = 0
        padded[:, top_in:bottom_in, left_in:right_in] = x[
            ns, top_in + first : bottom_in + first, left_in - left : right_in - left
        ]
        yield ns, hs, seen


def _inside(size, start, length):
    """Return the part of 0…size that an image of this length covers from `start` on."""
    begin = min(size, max(0, start))
    return begin, max(begin, min(size, start + length))


def turned_kernel(w: Array, padding: tuple[int, int, int, int]) -> tuple[Array, tuple[int, ...]]:
    """Return the kernel and padding with which a convolution of dy with stride 1 gives dx."""
    kh, kw = w.shape[:2]
    top, bottom, left, right = padding
    around = (kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right)
    return w[::-1, ::-1].swapaxes(2, 3), around


def bias_gradient(b: Array | None, dy: Array) -> Array | None:
    """Sum dy (n, h, w, c) over all pixels, as a matrix product: faster than `sum`."""
    if b is None:
        return None
    dy_rows = dy.reshape(-1, dy.shape[3])
    return array_module(dy).ones(len(dy_rows), dy.dtype) @ dy_rows
