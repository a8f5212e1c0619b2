"""Two-dimensional convolution: the file that decides how fast everything is.

x (n, h, w, c_in), kernel w (kh, kw, c_in, c_out) → y (n, h', w', c_out). As everywhere in deep
learning it is a cross-correlation: the kernel is not flipped.

Each output pixel is the product of its neighbourhood, a row of kh·kw·c_in numbers, with the kernel
seen as a (kh·kw·c_in, c_out) matrix. The rows of a whole batch would be nine times the picture, so
they are gathered in blocks that stay in a core's cache while the matrix product reads them.
"""

from tinyldm.backend import Array, array_module, on_host
from tinyldm.nn.pieces import blocks
from tinyldm.nn.protocol import Backward, differentiable

Padding = int | tuple[int, int, int, int]  # zeros on all sides, or (top, bottom, left, right)

BLOCK_BYTES = 2**20  # of gathered rows at a time in the passes to y and to dx
WEIGHT_BLOCK_BYTES = 2**21  # in the pass to dw, where each block also costs an addition to dw

# "pointwise": a 1×1 kernel is one matrix product.
# "gather": dx is a convolution too, of dy with the kernel turned by 180° (stride 1 only).
# "scatter": dx by adding each product row back to where its numbers were gathered.
ALGORITHMS = ("pointwise", "gather", "scatter")


def algorithms_for(
    kernel: tuple[int, int], stride: int, padding: tuple[int, int, int, int]
) -> list[str]:
    """The ALGORITHMS that can do this shape, the fastest first."""
    pointwise = kernel == (1, 1) and stride == 1 and padding == (0, 0, 0, 0)
    able = {"pointwise": pointwise, "gather": stride == 1, "scatter": True}
    return [name for name in ALGORITHMS if able[name]]


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
    able = algorithms_for((kh, kw), stride, padding)
    algorithm = algorithm or able[0]
    if algorithm not in able:
        raise ValueError(f"conv2d: algorithm: expected one of {able} here, found {algorithm!r}")
    if algorithm == "pointwise":
        y = (x.reshape(-1, c_in) @ w[0, 0]).reshape(*x.shape[:3], c_out)
    else:
        y = _correlate(_pad(x, padding), w, stride, out_h, out_w)
    if b is not None:
        y += b

    def backward(dy, weights=True):
        dw = db = None
        if weights:
            db = None if b is None else dy.reshape(-1, c_out).sum(axis=0)
            if algorithm == "pointwise":
                dw = (x.reshape(-1, c_in).T @ dy.reshape(-1, c_out)).reshape(w.shape)
            else:
                dw = _weight_gradient(_pad(x, padding), dy, w.shape, stride)
        if algorithm == "pointwise":
            dx = (dy.reshape(-1, c_out) @ w[0, 0].T).reshape(x.shape)
        elif algorithm == "gather":
            turned = w[::-1, ::-1].transpose(0, 1, 3, 2)
            around = (kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right)
            dx = _correlate(_pad(dy, around), turned, 1, *x.shape[1:3])
        else:
            dx = _scatter(dy, w, stride, padding, x.shape)
        return dx, dw, db

    return y, backward


def _pad(x, padding):
    """Zeros around x (n, h, w, c); a negative number cuts instead."""
    top, bottom, left, right = padding
    x = x[:, max(0, -top) : x.shape[1] + min(0, bottom), max(0, -left) : x.shape[2] + min(0, right)]
    top, bottom, left, right = (max(0, side) for side in padding)
    if top == bottom == left == right == 0:
        return x
    n, h, w, c = x.shape
    padded = array_module(x).zeros((n, top + h + bottom, left + w + right, c), x.dtype)
    padded[:, top : top + h, left : left + w] = x
    return padded


def _correlate(x, w, stride, out_h, out_w):
    """Convolution of an x that is padded already."""
    xp = array_module(x)
    kh, kw, c_in, c_out = w.shape
    matrix = w.reshape(kh * kw * c_in, c_out)
    y = xp.empty((x.shape[0], out_h, out_w, c_out), x.dtype)
    for ns, hs, rows in _gather(x, (kh, kw), stride, out_h, out_w, BLOCK_BYTES):
        xp.matmul(rows, matrix, out=y[ns, hs].reshape(-1, c_out))
    return y


def _weight_gradient(x, dy, shape, stride):
    kh, kw, c_in, c_out = shape
    dw = 0
    for ns, hs, rows in _gather(x, (kh, kw), stride, *dy.shape[1:3], WEIGHT_BLOCK_BYTES):
        dw += rows.T @ dy[ns, hs].reshape(-1, c_out)
    return dw.reshape(shape)


def _gather(x, kernel, stride, out_h, out_w, block_bytes):
    """Yield (samples, output rows, neighbourhoods): a block of (pixels, kh·kw·c) at a time.

    The buffer of a block is used again for the next one.
    """
    xp = array_module(x)
    n, _, _, c = x.shape
    kh, kw = kernel
    sn, sh, sw, sc = x.strides
    # [n, y, x, i, j, c] = x[n, y·stride + i, x·stride + j, c], without a copy
    windows = xp.lib.stride_tricks.as_strided(
        x, (n, out_h, out_w, kh, kw, c), (sn, sh * stride, sw * stride, sh, sw, sc)
    )
    row_bytes = out_w * kh * kw * c * x.itemsize
    buffer = None
    for ns, hs in blocks(n, out_h, row_bytes, block_bytes if on_host(x) else 64 * block_bytes):
        block = windows[ns, hs]
        if buffer is None or buffer.shape != block.shape:
            buffer = xp.empty(block.shape, x.dtype)
        buffer[...] = block
        yield ns, hs, buffer.reshape(-1, kh * kw * c)


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
