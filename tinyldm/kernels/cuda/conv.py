"""Convolution by im2col on a GPU; a kernel of `nn.conv.conv2d`.

Windows are gathered in blocks, one launch each, zeros around the image included. What goes back to
the pixels is gathered, too: each pixel adds up what the windows have for it, always in one order.
"""

import math

from tinyldm.backend import Array, array_module
from tinyldm.kernels.blocking import blocks
from tinyldm.kernels.cuda.cublas import product
from tinyldm.kernels.cuda.launch import column_sums, each_row, on_gpu
from tinyldm.kernels.registry import kernel
from tinyldm.kernels.windows import turned_kernel
from tinyldm.nn.conv import Padding, output_shape
from tinyldm.nn.protocol import Backward

BLOCK_BYTES = 2**28  # of gathered windows at a time


@kernel("nn.conv.conv2d", cost=on_gpu)
def fused_im2col(
    x: Array, w: Array, b: Array | None = None, stride: int = 1, padding: Padding = 1
) -> tuple[Array, Backward]:
    """Gather windows in blocks of BLOCK_BYTES, each for one matrix product.

    With stride 1 dx is a convolution too, of dy with the kernel turned by 180°.
    """
    xp = array_module(x)
    *outputs, padding = output_shape(x.shape, w.shape, stride, padding)
    x, c_out = xp.ascontiguousarray(x), w.shape[3]
    y = _correlate(x, w, b, stride, padding, outputs)

    def backward(dy, weights=True):
        dw = db = None
        dy = xp.ascontiguousarray(dy)
        if weights:
            dw = xp.empty((w.size // c_out, c_out), w.dtype)
            for i, (rows, ns, hs) in enumerate(_windows(x, w.shape, stride, padding, outputs)):
                product(rows.T, dy[ns, hs].reshape(-1, c_out), dw, add=i > 0)
            dw = dw.reshape(w.shape)
            db = None if b is None else column_sums(dy.reshape(-1, c_out))
        if stride > 1:
            return _scatter(dy, w, stride, padding, x.shape), dw, db
        turned, around = turned_kernel(w, padding)
        return _correlate(dy, turned, None, 1, around, x.shape[:3]), dw, db

    return y, backward


def _windows(x, shape, stride, padding, outputs):
    """Yield the windows of a block of outputs as rows of a matrix, with its samples and rows."""
    kh, kw, c, _ = shape
    _, h, width, _ = x.shape
    n, out_h, out_w = outputs
    top, _, left, _ = padding
    if (kh, kw, stride) == (1, 1, 1) and not any(padding):
        yield x.reshape(-1, c), slice(0, n), slice(0, out_h)
        return
    for ns, hs in blocks(n, out_h, out_w * kh * kw * c * x.itemsize, BLOCK_BYTES):
        lines = hs.stop - hs.start
        rows = array_module(x).empty(((ns.stop - ns.start) * lines * out_w, kh * kw * c), x.dtype)
        sizes = h, width, c, lines, out_w, kh, kw, stride, top, left, hs.start
        each_row("gather", *rows.shape, x[ns], rows, *sizes)
        yield rows, ns, hs


def _correlate(x, w, b, stride, padding, outputs):
    c_out = w.shape[3]
    matrix = w.reshape(-1, c_out)
    y = array_module(x).empty((*outputs, c_out), x.dtype)
    for rows, ns, hs in _windows(x, w.shape, stride, padding, outputs):
        product(rows, matrix, y[ns, hs].reshape(-1, c_out))  # whole samples, or rows of one
    if b is not None:
        y += b
    return y


def _scatter(dy, w, stride, padding, shape):
    """Return dx (n, h, w, c) of a convolution, from dy (n, h', w', c_out)."""
    kh, kw, c, c_out = w.shape
    n, h, width, _ = shape
    out_h, out_w = dy.shape[1:3]
    top, _, left, _ = padding
    dx, matrix = array_module(dy).empty(shape, dy.dtype), w.reshape(-1, c_out).T
    for ns, _ in blocks(n, 1, out_h * out_w * math.prod(w.shape[:3]) * dy.itemsize, BLOCK_BYTES):
        rows = product(dy[ns].reshape(-1, c_out), matrix)
        sizes = h, width, c, out_h, out_w, kh, kw, stride, top, left
        each_row("scatter", dx[ns].size // c, c, rows, dx[ns], *sizes)
    return dx
