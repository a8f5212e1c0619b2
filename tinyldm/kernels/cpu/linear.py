"""Linear maps, all rows in one product into aligned memory; twin of `nn.functional.linear`."""

import numpy as np

from tinyldm.backend import Array
from tinyldm.kernels.blocking import add_to_rows
from tinyldm.kernels.registry import kernel
from tinyldm.kernels.workspace import empty
from tinyldm.nn.protocol import Backward


@kernel("nn.functional.linear")
def linear(x: Array, w: Array, b: Array | None = None) -> tuple[Array, Backward]:
    """Multiply all rows of x at once, and sum over them by a product too."""
    x_rows = x.reshape(-1, x.shape[-1])
    y = empty((len(x_rows), len(w)), x, w)
    np.matmul(x_rows, w.T, out=y)
    if b is not None:
        add_to_rows(y, b)

    def backward(dy, weights=True):
        dy_rows = dy.reshape(-1, len(w))
        dx = empty(x_rows.shape, dy, w)
        np.matmul(dy_rows, w, out=dx)
        dx = dx.reshape(x.shape)
        if not weights:
            return dx, None, None
        ones = np.ones(len(dy_rows), dy.dtype)
        return dx, dy_rows.T @ x_rows, None if b is None else ones @ dy_rows

    return y.reshape(*x.shape[:-1], len(w)), backward
