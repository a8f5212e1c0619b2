"""Activations in blocks that fit the cache, on all cores; twins of `nn.activations`."""

from collections.abc import Callable

import numpy as np

from tinyldm.kernels.blocking import each_block
from tinyldm.kernels.registry import kernel
from tinyldm.nn.activations import leaky_relu, quick_gelu, silu


def in_blocks(activation: Callable) -> Callable:
    """Make a kernel of an `elementwise` function: f and f′ of one block at a time."""

    def apply(x):
        y = np.empty(x.shape, x.dtype)

        def forward(x_, y_):
            y_[...] = activation.f(x_)

        each_block(forward, _rows(x), _rows(y))

        def backward(dy):
            dx = np.empty(x.shape, x.dtype)

            def block(x_, dy_, dx_):
                np.multiply(dy_, activation.derivative(x_), out=dx_)

            each_block(block, _rows(x), _rows(dy), _rows(dx))
            return dx

        return y, backward

    apply.__name__ = activation.__name__
    return kernel(f"nn.activations.{activation.__name__}")(apply)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


ACTIVATIONS = {f.__name__: in_blocks(f) for f in (silu, quick_gelu, leaky_relu)}
