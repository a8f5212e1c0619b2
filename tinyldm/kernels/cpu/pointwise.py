"""A 1×1 convolution as a linear map of every pixel; a kernel of `nn.conv.conv2d`."""

import numpy as np

from tinyldm.backend import Array
from tinyldm.kernels.cpu.linear import linear
from tinyldm.kernels.registry import NEVER, kernel, on_cpu
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
    y, linear_back = linear(x, w[0, 0].T, b)

    def backward(dy, weights=True):
        dx, dw, db = linear_back(dy, weights)
        if weights:
            dw = np.ascontiguousarray(dw.T)[None, None]
        return dx, dw, db

    return y, backward
