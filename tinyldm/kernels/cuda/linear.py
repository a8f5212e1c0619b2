"""The linear map on a GPU; the twin of `nn.functional.linear`.

For an array of matrices CuPy would copy the weights, and list the places of all of them.
"""

from tinyldm.backend import Array, array_module
from tinyldm.kernels.cuda.cublas import product
from tinyldm.kernels.cuda.launch import column_sums, on_gpu
from tinyldm.kernels.registry import kernel
from tinyldm.nn.protocol import Backward


@kernel("nn.functional.linear", cost=on_gpu)
def one_product_linear(x: Array, w: Array, b: Array | None = None) -> tuple[Array, Backward]:
    """Multiply all rows of x at once."""
    xp = array_module(x)
    d_out, d_in = w.shape
    rows = xp.ascontiguousarray(x).reshape(-1, d_in)
    y = product(rows, w.T)
    if b is not None:
        y += b

    def backward(dy, weights=True):
        dy_rows = xp.ascontiguousarray(dy).reshape(-1, d_out)
        dx = product(dy_rows, w).reshape(x.shape)
        if not weights:
            return dx, None, None
        return dx, product(dy_rows.T, rows), None if b is None else column_sums(dy_rows)

    return y.reshape(*x.shape[:-1], d_out), backward
