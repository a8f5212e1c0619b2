"""Two-dimensional convolution: the file that decides how fast everything is.

x (n, h, w, c_in), kernel w (kh, kw, c_in, c_out) → y (n, h', w', c_out). As everywhere in deep
learning it is a cross-correlation: the kernel is not flipped.

Each output pixel is the product of its neighbourhood, a row of kh·kw·c_in numbers, with the kernel
seen as a (kh·kw·c_in, c_out) matrix. The rows of a whole batch would be nine times the picture, so
they are gathered in blocks that stay in a core's cache while the matrix product reads them.

Winograd's algorithm does a 3×3 convolution with 16 products for each 2×2 square of outputs where
the rows above take 36. Its transforms of picture, kernel and result are matrix products too.
"""

import functools
import math

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.nn.pieces import blocks, empty, product, scratch, spread
from tinyldm.nn.protocol import Backward, differentiable

Padding = int | tuple[int, int, int, int]  # zeros on all sides, or (top, bottom, left, right)

BLOCK_BYTES = 2**20  # of gathered neighbourhoods at a time in the passes to y and to dx
WEIGHT_BLOCK_BYTES = 2**20  # in the pass to dw, where each block also costs an addition to dw
WINOGRAD_CHANNELS = 32  # with fewer, in or out, the transforms cost more than they save
WINOGRAD_PIXELS = 128  # with fewer, that of the kernel does
WINOGRAD_TILES = 128  # at least, in a block: products of fewer rows wait for the kernels
WINOGRAD_WORK = 2**20  # pixels · c_in · c_out; with less, the calls do

# "pointwise": a 1×1 kernel is one matrix product.
# "winograd": 3×3 kernels with stride 1; all three passes at 4/9 of the multiplications.
# "gather": dx is a convolution too, of dy with the kernel turned by 180° (stride 1 only).
# "scatter": dx by adding each product row back to where its numbers were gathered.
ALGORITHMS = ("pointwise", "winograd", "gather", "scatter")


def algorithms_for(
    kernel: tuple[int, int, int, int],
    stride: int,
    padding: tuple[int, int, int, int],
    pixels: float = math.inf,
) -> list[str]:
    """The ALGORITHMS that can do a kernel (kh, kw, c_in, c_out), the fastest first.

    pixels: outputs of the whole batch, or 0 on a GPU, which waits for memory anyway.
    """
    pointwise = kernel[:2] == (1, 1) and stride == 1 and padding == (0, 0, 0, 0)
    winograd = kernel[:2] == (3, 3) and stride == 1
    able = {"pointwise": pointwise, "winograd": winograd, "gather": stride == 1, "scatter": True}
    names = [name for name in ALGORITHMS if able[name]]
    if winograd and (
        min(kernel[2:]) < WINOGRAD_CHANNELS
        or pixels < WINOGRAD_PIXELS
        or pixels * kernel[2] * kernel[3] < WINOGRAD_WORK
    ):
        names.append(names.pop(0))
    return names


@differentiable
def conv2d(
    x: Array,
    w: Array,
    b: Array | None = None,
    stride: int = 1,
    padding: Padding = 1,
    algorithm: str | None = None,
) -> tuple[Array, Backward]:
    """Convolve x (n, h, w, c_in) with w (kh, kw, c_in, c_out), b (c_out,) → (n, h', w', c_out).

    `padding`: zeros on all sides, or (top, bottom, left, right); the autoencoder downsamples with
    (0, 1, 0, 1). `algorithm`: one of ALGORITHMS, or None for the fastest. Raises ValueError for
    shapes that do not fit, or for an algorithm that cannot do them.
    """
    kh, kw, c_in, c_out = w.shape
    if x.ndim != 4 or x.shape[3] != c_in:
        raise ValueError(f"conv2d: expected x (n, h, w, {c_in}), found {x.shape}")
    padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    top, bottom, left, right = padding
    out_h = (x.shape[1] + top + bottom - kh) // stride + 1
    out_w = (x.shape[2] + left + right - kw) // stride + 1
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"conv2d: a {kh}×{kw} kernel does not fit into {x.shape[1]}×{x.shape[2]} pixels "
            f"with padding {padding}"
        )
    pixels = len(x) * out_h * out_w if on_host(x) else 0
    able = algorithms_for(w.shape, stride, padding, pixels)
    algorithm = algorithm or able[0]
    if algorithm not in able:
        raise ValueError(f"conv2d: algorithm: expected one of {able} here, found {algorithm!r}")
    if x.dtype != w.dtype:  # as where a gradient check makes the weights complex, not the data
        x = x.astype(np.result_type(x.dtype, w.dtype))
    if algorithm == "pointwise":
        y = empty((*x.shape[:3], c_out), x)
        product(x.reshape(-1, c_in), w[0, 0], y.reshape(-1, c_out))
        if b is not None:
            y += b
    elif algorithm == "winograd":
        y = _winograd(x, w, b, padding, out_h, out_w)
    else:
        y = _correlate(x, w, b, stride, padding, out_h, out_w)

    def backward(dy, weights=True):
        dw = db = None
        if weights:
            dy_rows = dy.reshape(-1, c_out)
            db = None if b is None else array_module(dy).ones(len(dy_rows), dy.dtype) @ dy_rows
            if algorithm == "pointwise":
                dw = (x.reshape(-1, c_in).T @ dy_rows).reshape(w.shape)
            elif algorithm == "winograd":
                dw = _winograd_weight_gradient(x, dy, padding)
            else:
                dw = _weight_gradient(x, dy, w.shape, stride, padding)
        if algorithm == "pointwise":
            dx = (dy.reshape(-1, c_out) @ w[0, 0].T).reshape(x.shape)
        elif algorithm == "scatter":
            dx = _scatter(dy, w, stride, padding, x.shape)
        else:
            turned = array_module(w).ascontiguousarray(w[::-1, ::-1].transpose(0, 1, 3, 2))
            around = (kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right)
            if algorithm == "winograd":
                dx = _winograd(dy, turned, None, around, *x.shape[1:3])
            else:
                dx = _correlate(dy, turned, None, 1, around, *x.shape[1:3])
        return dx, dw, db

    return y, backward


# ----------------------------------------------------------------------------------------- windows


def _windows(x, kernel, stride, padding, out_h, out_w, budget):
    """Yield (samples, output rows, windows): what the outputs of a block see, zeros around x.

    windows [n, y, x, i, j, c] = x[n, y·stride + i − top, x·stride + j − left, c] is a view of a
    buffer that is filled anew for the next block. `budget`: bytes of all windows of a block.
    """
    xp = array_module(x)
    n, h, w, c = x.shape
    kh, kw = kernel
    top, _, left, _ = padding
    width = (out_w - 1) * stride + kw  # of x with its padding, as far as it is seen
    left_in, right_in = _inside(width, left, w)
    padded = None
    row_bytes = out_w * kh * kw * c * x.itemsize
    for ns, hs in blocks(n, out_h, row_bytes, budget if on_host(x) else 64 * budget):
        samples, rows = ns.stop - ns.start, hs.stop - hs.start
        height = (rows - 1) * stride + kh
        if padded is None or padded.shape[:2] != (samples, height):
            padded = xp.zeros((samples, height, width, c), x.dtype)
            sn, sh, sw, sc = padded.strides
            windows = xp.lib.stride_tricks.as_strided(
                padded,
                (samples, rows, out_w, kh, kw, c),
                (sn, sh * stride, sw * stride, sh, sw, sc),
            )
        first = hs.start * stride - top  # the row of x that is the first of `padded`
        top_in, bottom_in = _inside(height, -first, h)
        if top_in:
            padded[:, :top_in] = 0
        if bottom_in < height:
            padded[:, bottom_in:] = 0
        padded[:, top_in:bottom_in, left_in:right_in] = x[
            ns, top_in + first : bottom_in + first, left_in - left : right_in - left
        ]
        yield ns, hs, windows


def _inside(size, start, length):
    """The part of 0…size that a picture of this length covers from `start` on."""
    begin = min(size, max(0, start))
    return begin, max(begin, min(size, start + length))


# ---------------------------------------------------------------------------------- gather, scatter


def _correlate(x, w, b, stride, padding, out_h, out_w):
    kh, kw, c_in, c_out = w.shape
    matrix = w.reshape(kh * kw * c_in, c_out)
    y = empty((x.shape[0], out_h, out_w, c_out), x)
    for ns, hs, windows in _windows(x, (kh, kw), stride, padding, out_h, out_w, BLOCK_BYTES):
        (rows,) = scratch(x, windows.size)
        rows.reshape(windows.shape)[...] = windows
        block = y[ns, hs].reshape(-1, c_out)
        product(rows.reshape(-1, len(matrix)), matrix, block)
        if b is not None:
            block += b
    return y


def _weight_gradient(x, dy, shape, stride, padding):
    kh, kw, c_in, c_out = shape
    dw = 0
    for ns, hs, windows in _windows(
        x, (kh, kw), stride, padding, *dy.shape[1:3], WEIGHT_BLOCK_BYTES
    ):
        (rows,) = scratch(x, windows.size)
        rows.reshape(windows.shape)[...] = windows
        dw += rows.reshape(-1, kh * kw * c_in).T @ dy[ns, hs].reshape(-1, c_out)
    return dw.reshape(shape)


def _scatter(dy, w, stride, padding, shape):
    """Send each dy (n, h', w', c_out) back to the pixels it was computed from."""
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


# ---------------------------------------------------------------------------------------- Winograd
#
# F(2×2, 3×3) of Lavin & Gray 2015, section 4.1. A tile is a 4×4 window of x, the next one two
# pixels on; it gives 2×2 outputs. With ⊙ the product of equal places (summed over c_in),
#
#     y = Aᵀ [(Bᵀ x B) ⊙ (G w Gᵀ)] A        dw = Gᵀ [(Bᵀ x B) ⊙ (A dy Aᵀ)] G
#
# On tiles laid out flat, Bᵀ x B is the (16, 16) matrix Bᵀ ⊗ Bᵀ times x, and the same for the rest;
# ⊙ is 16 matrix products. float32 keeps about 1e-6 of the largest output (test_conv.py).

_BT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_AT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
_CENTRE = 5  # the place (1, 1) of a tile, which each of the four outputs takes once


def _winograd(x, w, b, padding, out_h, out_w):
    c_in, c_out = w.shape[2:]
    tiles_h, tiles_w = -(-out_h // 2), -(-out_w // 2)
    kernels = empty((16, c_in, c_out), x)
    _transform("kernel", w, kernels)
    y = empty((x.shape[0], 2 * tiles_h, 2 * tiles_w, c_out), x)
    squares = _squares(y)
    for ns, hs, windows in _windows(
        x, (4, 4), 2, padding, tiles_h, tiles_w, _budget(x, BLOCK_BYTES)
    ):
        count = windows.size // (16 * c_in)
        width = 16 * count * max(c_in, c_out)
        lowered, tiles = scratch(x, width, width)
        _transform_windows(windows, lowered, tiles)
        products = lowered[: 16 * count * c_out].reshape(16, count, c_out)
        product(tiles[: windows.size].reshape(16, count, c_in), kernels, products)
        if b is not None:
            products[_CENTRE] += b
        outputs = tiles[: 4 * count * c_out]
        _transform("output", products, outputs)
        block = squares[:, :, ns, hs]
        block[...] = outputs.reshape(block.shape)
    return y if (out_h, out_w) == y.shape[1:3] else y[:, :out_h, :out_w].copy()


def _winograd_weight_gradient(x, dy, padding):
    c_in, c_out = x.shape[3], dy.shape[3]
    out_h, out_w = dy.shape[1:3]
    tiles_h, tiles_w = -(-out_h // 2), -(-out_w // 2)
    if out_h % 2 or out_w % 2:
        even = array_module(dy).zeros((len(dy), 2 * tiles_h, 2 * tiles_w, c_out), dy.dtype)
        even[:, :out_h, :out_w] = dy
        dy = even
    squares = _squares(dy)
    dkernels = None
    for ns, hs, windows in _windows(
        x, (4, 4), 2, padding, tiles_h, tiles_w, _budget(x, WEIGHT_BLOCK_BYTES)
    ):
        count = windows.size // (16 * c_in)
        lowered, tiles, dproducts = scratch(
            x, max(windows.size, 4 * count * c_out), windows.size, 16 * count * c_out
        )
        _transform_windows(windows, lowered, tiles)
        block = squares[:, :, ns, hs]
        doutputs = lowered[: block.size]
        doutputs.reshape(block.shape)[...] = block
        _transform("doutput", doutputs, dproducts)
        part = empty((16, c_in, c_out), x)
        tiles_t = tiles.reshape(16, count, c_in).swapaxes(1, 2)
        product(tiles_t, dproducts.reshape(16, count, c_out), part)
        if dkernels is None:
            dkernels = part
        else:
            dkernels += part
    dw = empty((3, 3, c_in, c_out), x)
    _transform("dkernel", dkernels, dw)
    return dw


def _budget(x, block_bytes):
    """Bytes of windows in a block."""
    return max(block_bytes, WINOGRAD_TILES * 16 * x.shape[3] * x.itemsize)


def _squares(y):
    """y (n, 2i, 2j, c) → its 2×2 squares, the places in them first: (2, 2, n, i, j, c), a view."""
    n, h, w, c = y.shape
    return y.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 4, 0, 1, 3, 5)


def _transform_windows(windows, lowered, tiles):
    """windows [n, y, x, i, j, c] → Bᵀ x B of each, the places (i, j) first, in `tiles`."""
    taps_first = windows.transpose(3, 4, 0, 1, 2, 5)
    lowered = lowered[: windows.size]
    lowered.reshape(taps_first.shape)[...] = taps_first
    _transform("input", lowered, tiles[: windows.size])


def _transform(name, x, out):
    """out = M ⊗ M x, for x whose first numbers run over the places of a tile, square or kernel."""
    matrix = _transform_matrix(name, array_module(x), x.dtype.name)
    spread(matrix, x.reshape(matrix.shape[1], -1), out.reshape(matrix.shape[0], -1))


@functools.cache
def _transform_matrix(name, xp, dtype):
    m = {"input": _BT, "kernel": _G, "output": _AT, "dkernel": _G.T, "doutput": _AT.T}[name]
    return xp.asarray(np.kron(m, m).astype(dtype))
