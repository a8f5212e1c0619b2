"""Layer norm in blocks that fit the cache; the twin of `nn.norms.layer_norm`."""

import numpy as np

from tinyldm.backend import Array
from tinyldm.kernels.blocking import each_block
from tinyldm.kernels.registry import kernel
from tinyldm.kernels.workspace import empty, scratch_like
from tinyldm.nn.protocol import Backward


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
        (square,) = scratch_like(y_)
        np.matmul(x_, average, out=mean_)
        np.subtract(x_, mean_, out=y_)
        np.multiply(y_, y_, out=square)
        rstd_[...] = 1 / np.sqrt(square @ average + eps)
        y_ *= rstd_
        y_ *= w
        y_ += b

    each_block(forward, x2, y, mean, rstd)

    def backward(dy, weights=True):
        dx = empty(x2.shape, dy, w)
        w_average = (w * (1 / d))[:, None]

        def part(x_, dy_, dx_, mean_, rstd_):
            normal, weighted = scratch_like(dx_, 2)
            np.subtract(x_, mean_, out=normal)
            normal *= rstd_
            np.multiply(dy_, normal, out=weighted)
            along, across = weighted @ w_average, dy_ @ w_average
            ones = np.ones((1, len(x_)), x.dtype)
            dw_db = (ones @ weighted, ones @ dy_) if weights else None
            np.multiply(dy_, w, out=dx_)
            dx_ -= across
            normal *= along
            dx_ -= normal
            dx_ *= rstd_
            return dw_db

        parts = each_block(part, x2, dy.reshape(x2.shape), dx, mean, rstd)
        dx = dx.reshape(x.shape)
        return (dx, *(sum(z)[0] for z in zip(*parts, strict=True))) if weights else (dx, None, None)

    return y.reshape(x.shape), backward
