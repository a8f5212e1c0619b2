"""GELU and GEGLU, with a fast normal distribution in float32; twins of `nn.activations`."""

import math

import numpy as np

from tinyldm.backend import Array
from tinyldm.kernels.blocking import each_block
from tinyldm.kernels.registry import kernel
from tinyldm.nn import activations
from tinyldm.nn.protocol import Backward


@kernel("nn.activations.gelu")
def gelu(x: Array) -> tuple[Array, Backward]:
    """Compute x Φ(x), block by block."""
    y = np.empty(x.shape, x.dtype)

    def block(x_, y_):
        np.multiply(x_, normal_cdf(x_), out=y_)

    each_block(block, _rows(x), _rows(y))

    def backward(dy):
        dx = np.empty(x.shape, x.dtype)

        def block(x_, dy_, dx_):
            np.multiply(dy_, normal_cdf(x_) + x_ * _normal_density(x_), out=dx_)

        each_block(block, _rows(x), _rows(dy), _rows(dx))
        return dx

    return y, backward


@kernel("nn.activations.geglu")
def geglu(x: Array) -> tuple[Array, Backward]:
    """Compute value · gate Φ(gate), block by block."""
    d = x.shape[-1] // 2
    y = np.empty((*x.shape[:-1], d), x.dtype)

    def block(x_, y_):
        value, gate = x_[:, :d], x_[:, d:]
        cdf = normal_cdf(gate)
        cdf *= gate
        np.multiply(value, cdf, out=y_)

    each_block(block, _rows(x), _rows(y))

    def backward(dy):
        dx = np.empty(x.shape, x.dtype)

        def block(x_, dy_, dx_):
            value, gate = x_[:, :d], x_[:, d:]
            cdf = normal_cdf(gate)
            slope = _normal_density(gate)
            slope *= gate
            slope += cdf
            slope *= value
            cdf *= gate
            np.multiply(dy_, cdf, out=dx_[:, :d])
            np.multiply(dy_, slope, out=dx_[:, d:])

        each_block(block, _rows(x), _rows(dy), _rows(dx))
        return dx

    return y, backward


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _normal_density(x):
    y = x * x
    y *= -0.5
    y = np.exp(y)
    y *= 1 / math.sqrt(2 * math.pi)
    return y


# erf(x/√2) = tanh(x P(x²)). The coefficients of P, lowest first, are the weighted minimax fit on
# |x| ≤ 5.6 that tests/kernels/test_gelu.py repeats; in float32 the error stays below 1.5e-7.
_CDF_COEFFICIENTS = (
    7.97884941e-01,
    3.63330846e-02,
    -3.25949754e-05,
    -5.53061938e-05,
    3.96474443e-06,
    -1.32263341e-07,
    1.75617078e-09,
)


def normal_cdf(x: Array) -> Array:
    """Compute Φ(x): in float32 within 1e-7 and fast, else exactly, as the plain function does."""
    if x.dtype != "float32":
        return activations.normal_cdf(x)
    x = np.clip(x, -6, 6)  # beyond, Φ is 0 or 1 to the last bit
    square = x * x
    y = square * _CDF_COEFFICIENTS[-1]
    for coefficient in _CDF_COEFFICIENTS[-2:0:-1]:
        y += coefficient
        y *= square
    y += _CDF_COEFFICIENTS[0]
    y *= x
    np.tanh(y, out=y)
    y *= 0.5
    y += 0.5
    return y
