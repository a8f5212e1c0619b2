"""A 1×1 convolution as one matrix product; a kernel of `nn.conv.conv2d`."""

import numpy as np

from tinyldm.backend import Array
from tinyldm.kernels.registry import NEVER, kernel, on_cpu
from tinyldm.kernels.windows import bias_gradient
from tinyldm.kernels.workspace import empty
from tinyldm.nn.conv import Padding, output_shape
from tinyldm.nn.protocol import Backward


def _cost(x, w, b=None, stride=1, padding=1):
    if w.shape[0] != 1 or w.shape[1] != 1 or stride != 1 or padding not in (0, (0, 0, 0, 0)):
        return NEVER
    return on_cpu(x)


@kernel("nn.conv.conv2d", cost=_cost)
def pointwise(
    x: Array, w: Array, b: Array | None = None, stride: int = 1, padding: Padding = 0
) -> tuple[Array, Backward]:
    """Multiply every pixel by the kernel; stride 1, no padding."""
    output_shape(x.shape, w.shape, stride, padding)
    c_in, c_out = w.shape[2:]
    y = empty((*x.shape[:3], c_out), x, w)
    np.matmul(x.reshape(-1, c_in), w[0, 0], out=y.reshape(-1, c_out))
    if b is not None:
        y += b

    def backward(dy, weights=True):
        dy_rows = dy.reshape(-1, c_out)
        dx = (dy_rows @ w[0, 0].T).reshape(x.shape)
        if not weights:
            return dx, None, None
        return dx, (x.reshape(-1, c_in).T @ dy_rows).reshape(w.shape), bias_gradient(b, dy)

    return y, backward
