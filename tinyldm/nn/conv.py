"""Two-dimensional convolution by im2col: gather each window as a row, then one matrix product.

As everywhere in deep learning it is a cross-correlation: the kernel is not flipped.
"""

from tinyldm.backend import Array, array_module
from tinyldm.nn.protocol import Backward, differentiable

Padding = int | tuple[int, int, int, int]  # zeros on all sides, or (top, bottom, left, right)


@differentiable
def conv2d(
    x: Array, w: Array, b: Array | None = None, stride: int = 1, padding: Padding = 1
) -> tuple[Array, Backward]:
    """Convolve x (n, h, w, c_in) with w (kh, kw, c_in, c_out), b (c_out,) → (n, h', w', c_out).

    `padding`: zeros on all sides, or (top, bottom, left, right); the autoencoder downsamples with
    (0, 1, 0, 1). Raises ValueError for shapes that do not fit.

    Each output pixel is the product of its window, a row of kh·kw·c_in values, with the kernel as a
    (kh·kw·c_in, c_out) matrix. On the way back each value of a window's gradient returns to the
    pixel that it was gathered from, and where windows overlap they add up.
    """
    xp = array_module(x)
    n, out_h, out_w, (top, bottom, left, right) = output_shape(x.shape, w.shape, stride, padding)
    kh, kw, c_in, c_out = w.shape
    matrix = w.reshape(kh * kw * c_in, c_out)
    h, width = x.shape[1:3]
    padded = xp.zeros((n, top + h + bottom, left + width + right, c_in), x.dtype)
    padded[:, top : top + h, left : left + width] = x
    windows = xp.lib.stride_tricks.sliding_window_view(padded, (kh, kw), axis=(1, 2))
    windows = windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)  # (n, h', w', kh, kw, c)

    # Rows are a copy, kh·kw times the size of x, so they are gathered again on the way back.
    y = windows.reshape(-1, kh * kw * c_in) @ matrix
    if b is not None:
        y = y + b

    def backward(dy, weights=True):
        dy_rows = dy.reshape(-1, c_out)
        dwindows = (dy_rows @ matrix.T).reshape(windows.shape)
        dpadded = xp.zeros(padded.shape, dwindows.dtype)
        for i in range(kh):
            for j in range(kw):
                ys, xs = slice(i, i + stride * out_h, stride), slice(j, j + stride * out_w, stride)
                dpadded[:, ys, xs] += dwindows[:, :, :, i, j]
        dx = dpadded[:, top : top + h, left : left + width].copy()
        if not weights:
            return dx, None, None
        dw = (windows.reshape(-1, kh * kw * c_in).T @ dy_rows).reshape(w.shape)
        return dx, dw, None if b is None else dy_rows.sum(axis=0)

    return y.reshape(n, out_h, out_w, c_out), backward


def output_shape(
    x: tuple[int, ...], w: tuple[int, ...], stride: int, padding: Padding
) -> tuple[int, int, int, tuple[int, int, int, int]]:
    """Return n, h', w' and the padding of all four sides, for inputs of the shapes x and w.

    Raises ValueError for shapes that do not fit.
    """
    kh, kw, c_in, _ = w
    if len(x) != 4 or x[3] != c_in:
        raise ValueError(f"conv2d: expected x (n, h, w, {c_in}), found {x}")
    padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    top, bottom, left, right = padding
    out_h = (x[1] + top + bottom - kh) // stride + 1
    out_w = (x[2] + left + right - kw) // stride + 1
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"conv2d: a {kh}×{kw} kernel does not fit into {x[1]}×{x[2]} pixels with padding "
            f"{padding}"
        )
    return x[0], out_h, out_w, padding
