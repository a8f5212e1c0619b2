"""Layer norm in blocks that fit the cache; the twin of `nn.norms.layer_norm`.

NumPy is slow where each row has a number of its own. So such numbers are written out as a matrix,
by a product, and all passes run over whole blocks.
"""

import numpy as np

from tinyldm.backend import Array
from tinyldm.kernels.blocking import (
    WORTH_WIDE,
    each_block,
    repeated,
    whole_rows,
    wide_rows,
)
from tinyldm.kernels.registry import kernel
from tinyldm.kernels.workspace import empty, scratch_like
from tinyldm.nn.protocol import Backward

UNSEEN = 1e-12  # the square of a shift, in deviations, that is left as it is


@kernel("nn.norms.layer_norm")
def layer_norm(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Backward]:
    """Normalise rows in blocks that fit the cache."""
    x2 = x.reshape(-1, x.shape[-1])
    d = x2.shape[1]
    y = empty(x2.shape, x, w)
    mean = np.empty((len(x2), 1), x.dtype)
    rstd = np.empty_like(mean)
    average = np.full((d, 1), 1 / d, x.dtype)

    def forward(x_, y_, mean_, rstd_):
        (table,) = scratch_like(y_)
        np.matmul(x_, average, out=mean_)
        np.subtract(x_, _columns(mean_, table), out=y_)
        variance, rest = np.multiply(y_, y_, out=table) @ average, y_ @ average
        if (np.square(rest.real) > UNSEEN * (variance.real + eps)).any():
            y_ -= _columns(rest, table)  # the mean of large numbers was rounded
            mean_ += rest
            variance = np.multiply(y_, y_, out=table) @ average
        np.divide(1, np.sqrt(variance + eps), out=rstd_)
        y_ *= _outer(rstd_, w, table)
        y_ = wide_rows(y_)
        with whole_rows(y_.shape[1]):
            y_ += repeated(b, y_)

    each_block(forward, x2, y, mean, rstd)

    def backward(dy, weights=True):
        dx = empty(x2.shape, dy, w)
        w_average = (w * (1 / d))[:, None]

        # dx = r (w dy − mean(w dy) − normal · mean(w dy · normal)), for normal = r · centred
        def part(x_, dy_, dx_, mean_, rstd_):
            centred, table = scratch_like(dx_, 2)
            np.subtract(x_, _columns(mean_, table), out=centred)
            product = np.multiply(dy_, centred, out=table)
            along = product @ w_average
            dw_db = None
            if weights:
                dw_db = rstd_.T @ product, np.ones((1, len(x_)), x.dtype) @ dy_
            np.multiply(dy_, _outer(rstd_, w, dx_), out=dx_)
            across = dx_ @ average
            centred *= _columns(along * rstd_**3, table)
            dx_ -= centred
            dx_ -= _columns(across, table)
            return dw_db

        parts = each_block(part, x2, dy.reshape(x2.shape), dx, mean, rstd)
        dx = dx.reshape(x.shape)
        return (dx, *(sum(z)[0] for z in zip(*parts, strict=True))) if weights else (dx, None, None)

    return y.reshape(x.shape), backward


def _outer(column, row, out):
    """Compute column · row, (n, 1) and (d,) → (n, d).

    Where it is large, as a matrix product over two terms, one of them 0: NumPy does not use BLAS
    for a product over one.
    """
    if out.size < WORTH_WIDE:
        return np.multiply(column, row, out=out)
    left = np.zeros((len(column), 2), out.dtype)
    right = np.zeros((2, len(row)), out.dtype)
    left[:, :1], right[0] = column, row
    return np.matmul(left, right, out=out)


def _columns(column, out):
    """Repeat a column (n, 1) → (n, d), where that is worth it."""
    return column if out.size < WORTH_WIDE else _outer(column, np.ones(out.shape[1]), out)
