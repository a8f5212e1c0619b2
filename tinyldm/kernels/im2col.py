"""Convolution by im2col in blocks, on any device; a kernel of `nn.conv.conv2d`.

The rows of a whole batch would be kh·kw times the image, so they are gathered in blocks that stay
in a core's cache while the matrix product reads them.
"""

import functools
import math

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.blocking import add_to_rows, blocks
from tinyldm.kernels.matmul import product
from tinyldm.kernels.registry import kernel
from tinyldm.kernels.windows import bias_gradient, cut, turned_kernel, windows
from tinyldm.kernels.workspace import empty, scratch
from tinyldm.nn.conv import Padding, output_shape
from tinyldm.nn.protocol import Backward
from tinyldm.threads import map_threads

# Bytes at a time, on the CPU: what a core's cache holds, about.
BLOCK_BYTES = 2**20  # of gathered windows
WEIGHT_BLOCK_BYTES = 2**20  # the same in the pass to dw, where each block adds to dw


def _cost(x, w, b=None, stride=1, padding=1):
    return _cost_of_shapes(x.shape, w.shape, stride, padding) if on_host(x) else 0.0


@functools.lru_cache(maxsize=4096)
def _cost_of_shapes(x, w, stride, padding):
    """Estimate the cost, by measurements of 3×3 kernels on one core (`python -m bench conv`)."""
    n, h, width, _ = output_shape(x, w, stride, padding)
    kh, kw, c_in, c_out = w
    of_kernel = 12  # the pixels whose products take as long as BLAS takes to order the kernel
    of_gathering = 16  # the same for outputs, to bring the rows together
    return (n * h * width + of_kernel) * kh * kw * c_in * (c_out + of_gathering)


@kernel("nn.conv.conv2d", cost=_cost)
def im2col(
    x: Array, w: Array, b: Array | None = None, stride: int = 1, padding: Padding = 1
) -> tuple[Array, Backward]:
    """Gather windows in blocks of BLOCK_BYTES or, on a GPU, 64 times that.

    With stride 1 dx is a convolution too, of dy with the kernel turned by 180°; otherwise each row
    of products is added back to where its values were gathered.
    """
    *outputs, padding = output_shape(x.shape, w.shape, stride, padding)
    if x.dtype != w.dtype:  # as where a gradient check makes the weights complex, not the data
        x = x.astype(np.result_type(x.dtype, w.dtype))
    y = _correlate(x, w, b, stride, padding, outputs)

    def backward(dy, weights=True):
        dw = db = None
        if weights:
            dw, db = _weight_gradient(x, dy, w.shape, stride, padding), bias_gradient(b, dy)
        if stride > 1:
            return _scatter(dy, w, stride, padding, x.shape), dw, db
        turned, around = turned_kernel(w, padding)
        return _correlate(dy, turned, None, 1, around, x.shape[:3]), dw, db

    return y, backward


def _rows(seen):
    """Return the windows as rows of a matrix, in scratch memory."""
    (rows,) = scratch(seen, seen.size)
    rows.reshape(seen.shape)[...] = seen
    return rows.reshape(-1, math.prod(seen.shape[3:]))


def _correlate(x, w, b, stride, padding, outputs):
    kh, kw, c_in, c_out = w.shape
    n, out_h, out_w = outputs
    matrix = w.reshape(kh * kw * c_in, c_out)
    y = empty((*outputs, c_out), x)

    def part(blocks):
        for ns, hs, seen in windows(x, (kh, kw), stride, padding, out_w, blocks):
            block = y[ns, hs].reshape(-1, c_out)
            product(_rows(seen), matrix, block)
            if b is not None:
                add_to_rows(block, b)

    map_threads(part, cut(n, out_h, out_w * len(matrix) * x.itemsize, BLOCK_BYTES, x))
    return y


def _weight_gradient(x, dy, shape, stride, padding):
    kh, kw, c_in, c_out = shape
    n, out_h, out_w, _ = dy.shape

    def part(blocks):
        dw = 0
        for ns, hs, seen in windows(x, (kh, kw), stride, padding, out_w, blocks):
            dw += _rows(seen).T @ dy[ns, hs].reshape(-1, c_out)
        return dw

    row_bytes = out_w * kh * kw * c_in * x.itemsize
    return sum(map_threads(part, cut(n, out_h, row_bytes, WEIGHT_BLOCK_BYTES, x))).reshape(shape)


def _scatter(dy, w, stride, padding, shape):
    """Scatter dy (n, h', w', c_out) back to the pixels it was computed from, and add it up."""
    xp = array_module(dy)
    kh, kw, c_in, c_out = w.shape
    top, bottom, left, right = padding
    n, h, width, _ = shape
    out_h, out_w = dy.shape[1:3]
    matrix = w.reshape(kh * kw * c_in, c_out).T
    padded = xp.zeros((n, top + h + bottom, left + width + right, c_in), dy.dtype)
    row_bytes = out_w * kh * kw * c_in * dy.itemsize
    for ns, hs in blocks(n, out_h, row_bytes, BLOCK_BYTES if on_host(dy) else 64 * BLOCK_BYTES):
        block = dy[ns, hs]
        products = (block.reshape(-1, c_out) @ matrix).reshape(*block.shape[:3], kh, kw, c_in)
        for i in range(kh):
            for j in range(kw):
                y0, y1 = hs.start * stride + i, (hs.stop - 1) * stride + i + 1
                x0, x1 = j, (out_w - 1) * stride + j + 1
                padded[ns, y0:y1:stride, x0:x1:stride] += products[:, :, :, i, j]
    return padded[:, top : top + h, left : left + width]
