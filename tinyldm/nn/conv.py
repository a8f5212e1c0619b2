"""Two-dimensional convolution: the file that decides how fast everything is.

x (n, h, w, c_in), kernel w (kh, kw, c_in, c_out) → y (n, h', w', c_out). As everywhere in deep
learning it is a cross-correlation: the kernel is not flipped.

Each output pixel is the product of its neighbourhood, a row of kh·kw·c_in numbers, with the kernel
seen as a (kh·kw·c_in, c_out) matrix. The rows of a whole batch would be nine times the picture, so
they are gathered in blocks that stay in a core's cache while the matrix product reads them.

Winograd's algorithm does a 3×3 convolution with 36 products for each 4×4 square of outputs where
the rows above take 144. Its transforms of picture, kernel and result are matrix products too.
"""

import functools
import math

import numpy as np

from tinyldm.backend import Array, array_module, map_threads, on_host
from tinyldm.nn import winograd
from tinyldm.nn.pieces import blocks, empty, product, scratch
from tinyldm.nn.protocol import Backward, differentiable
from tinyldm.nn.windows import cut, windows

Padding = int | tuple[int, int, int, int]  # zeros on all sides, or (top, bottom, left, right)

# "pointwise": a 1×1 kernel is one matrix product.
# "winograd4", "winograd2": 3×3 kernels with stride 1, in squares of 4×4 or 2×2 outputs; all three
# passes at 1/4 or 4/9 of the multiplications.
# "gather": dx is a convolution too, of dy with the kernel turned by 180° (stride 1 only).
# "scatter": dx by adding each product row back to where its numbers were gathered.
ALGORITHMS = ("pointwise", "winograd4", "winograd2", "gather", "scatter")
WINOGRAD = {"winograd4": 4, "winograd2": 2}  # outputs of a square, each way

# Bytes at a time, on the CPU: what a core's cache holds, about.
BLOCK_BYTES = 2**20  # of gathered neighbourhoods
WEIGHT_BLOCK_BYTES = 2**20  # the same in the pass to dw, where each block adds to dw


@functools.lru_cache(maxsize=4096)
def algorithms_for(
    kernel: tuple[int, int, int, int],
    stride: int,
    padding: tuple[int, int, int, int],
    outputs: tuple[int, int, int] | None = None,
) -> tuple[str, ...]:
    """The ALGORITHMS that can do a kernel (kh, kw, c_in, c_out), the fastest first.

    outputs: (n, h', w'); None on a GPU, which waits for memory, not for multiplications.
    """
    able = {
        "pointwise": kernel[:2] == (1, 1) and stride == 1 and padding == (0, 0, 0, 0),
        **dict.fromkeys(WINOGRAD, kernel[:2] == (3, 3) and stride == 1),
        "gather": stride == 1,
        "scatter": True,
    }
    names = [name for name in ALGORITHMS if able[name]]
    return tuple(sorted(names, key=lambda name: _cost(name, kernel, outputs)))


def _cost(algorithm, kernel, outputs):
    """About the time of a pass, in that of a multiplication within a large matrix product.

    The numbers are fits to measurements of 3×3 kernels on one core (`python -m bench conv`).
    """
    if algorithm == "pointwise" or outputs is None:
        return 1 if algorithm in WINOGRAD else 0
    n, h, w = outputs
    kh, kw, c_in, c_out = kernel
    if algorithm in WINOGRAD:
        m = WINOGRAD[algorithm]
        tiles = n * -(-h // m) * -(-w // m)
        of_kernel = 24  # the tiles whose products take as long as the transform of the kernel
        products = (tiles + of_kernel) * (m + 2) ** 2 * c_in * c_out
        transforms = tiles * m * m * 140 * (c_in + c_out) if min(c_in, c_out) >= 32 else math.inf
        return products + transforms + 1.5e6
    of_kernel = 12  # the pixels whose products take as long as BLAS takes to order the kernel
    of_gathering = 16  # the same for outputs, to bring the rows together
    products = (n * h * w + of_kernel) * kh * kw * c_in * (c_out + of_gathering)
    return products * (1.1 if algorithm == "scatter" else 1)


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
    outputs = (len(x), out_h, out_w)
    able = algorithms_for(w.shape, stride, padding, outputs if on_host(x) else None)
    algorithm = algorithm or able[0]
    if algorithm not in able:
        raise ValueError(
            f"conv2d: algorithm: expected one of {', '.join(able)} here, found {algorithm!r}"
        )
    if x.dtype != w.dtype:  # as where a gradient check makes the weights complex, not the data
        x = x.astype(np.result_type(x.dtype, w.dtype))
    if algorithm == "pointwise":
        y = empty((*x.shape[:3], c_out), x)
        product(x.reshape(-1, c_in), w[0, 0], y.reshape(-1, c_out))
        if b is not None:
            y += b
    elif algorithm in WINOGRAD:
        y = winograd.winograd(x, w, b, padding, outputs, WINOGRAD[algorithm])
    else:
        y = _correlate(x, w, b, stride, padding, outputs)

    def backward(dy, weights=True):
        dw = db = None
        if weights:
            dy_rows = dy.reshape(-1, c_out)
            db = None if b is None else array_module(dy).ones(len(dy_rows), dy.dtype) @ dy_rows
            if algorithm == "pointwise":
                dw = (x.reshape(-1, c_in).T @ dy_rows).reshape(w.shape)
            elif algorithm in WINOGRAD:
                dw = winograd.weight_gradient(x, dy, padding, WINOGRAD[algorithm])
            else:
                dw = _weight_gradient(x, dy, w.shape, stride, padding)
        if algorithm == "pointwise":
            dx = (dy.reshape(-1, c_out) @ w[0, 0].T).reshape(x.shape)
        elif algorithm == "scatter":
            dx = _scatter(dy, w, stride, padding, x.shape)
        else:
            turned = w[::-1, ::-1].swapaxes(2, 3)
            around = (kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right)
            if algorithm in WINOGRAD:
                dx = winograd.winograd(dy, turned, None, around, x.shape[:3], WINOGRAD[algorithm])
            else:
                dx = _correlate(dy, turned, None, 1, around, x.shape[:3])
        return dx, dw, db

    return y, backward


# ---------------------------------------------------------------------------------- gather, scatter


def _rows(seen):
    """The windows as rows of a matrix, in scratch memory."""
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
                block += b

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
