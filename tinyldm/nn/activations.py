"""The activations: functions of one element at a time, x (..., d) → (..., d).

As in `functional`, each works in float32, float64 and complex128, and gives its backward pass too.
The sigmoid, the slope of SiLU and the normal distribution are plain functions, for use in others.
"""

import math

from tinyldm.backend import Array, array_module, erf
from tinyldm.nn.pieces import as_rows, each_piece
from tinyldm.nn.protocol import Backward, differentiable


def sigmoid(x: Array) -> Array:
    """1 / (1 + e⁻ˣ) as ½ + ½ tanh(x/2), which cannot overflow."""
    s = array_module(x).tanh(0.5 * x)
    s *= 0.5
    s += 0.5
    return s


def silu_slope(x: Array) -> Array:
    """The derivative of `silu`, σ(x) (1 + x (1 − σ(x)))."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


@differentiable
def silu(x: Array) -> tuple[Array, Backward]:
    """y = x σ(x) (Ramachandran et al. 2017, "Searching for activation functions")."""
    xp = array_module(x)
    y = xp.empty(x.shape, x.dtype)

    def piece(x_, y_):
        xp.multiply(x_, sigmoid(x_), out=y_)

    each_piece(piece, as_rows(x), as_rows(y))

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)

        def piece(x_, dy_, dx_):
            xp.multiply(dy_, silu_slope(x_), out=dx_)

        each_piece(piece, as_rows(x), as_rows(dy), as_rows(dx))
        return dx

    return y, backward


@differentiable
def leaky_relu(x: Array, slope: float = 0.2) -> tuple[Array, Backward]:
    """y = x where x > 0, elsewhere slope · x (Maas et al. 2013); the slope at 0 is `slope`."""
    xp = array_module(x)
    y = xp.empty(x.shape, x.dtype)

    def bend(x_, from_, to_):
        to_[...] = xp.where(x_.real > 0, from_, slope * from_)

    each_piece(bend, as_rows(x), as_rows(x), as_rows(y))

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)
        each_piece(bend, as_rows(x), as_rows(dy), as_rows(dx))
        return dx

    return y, backward


@differentiable
def quick_gelu(x: Array) -> tuple[Array, Backward]:
    """y = x σ(1.702 x), CLIP's approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    xp = array_module(x)
    y = xp.empty(x.shape, x.dtype)

    def piece(x_, y_):
        xp.multiply(x_, sigmoid(1.702 * x_), out=y_)

    each_piece(piece, as_rows(x), as_rows(y))

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)

        def piece(x_, dy_, dx_):
            s = sigmoid(1.702 * x_)
            xp.multiply(dy_, s * (1 + 1.702 * x_ * (1 - s)), out=dx_)

        each_piece(piece, as_rows(x), as_rows(dy), as_rows(dx))
        return dx

    return y, backward


@differentiable
def gelu(x: Array) -> tuple[Array, Backward]:
    """y = x Φ(x), with Φ the exact normal distribution (Hendrycks & Gimpel 2016, section 2)."""
    xp = array_module(x)
    y = xp.empty(x.shape, x.dtype)

    def piece(x_, y_):
        xp.multiply(x_, normal_cdf(x_), out=y_)

    each_piece(piece, as_rows(x), as_rows(y))

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)

        def piece(x_, dy_, dx_):
            xp.multiply(dy_, normal_cdf(x_) + x_ * _normal_density(x_), out=dx_)

        each_piece(piece, as_rows(x), as_rows(dy), as_rows(dx))
        return dx

    return y, backward


@differentiable
def geglu(x: Array) -> tuple[Array, Backward]:
    """y = value · gelu(gate) for x = [value, gate] (..., 2d) → (..., d) (Shazeer 2020, eq. 5)."""
    xp = array_module(x)
    d = x.shape[-1] // 2
    y = xp.empty((*x.shape[:-1], d), x.dtype)

    def piece(x_, y_):
        value, gate = x_[:, :d], x_[:, d:]
        cdf = normal_cdf(gate)
        cdf *= gate
        xp.multiply(value, cdf, out=y_)

    each_piece(piece, as_rows(x), as_rows(y))

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)

        def piece(x_, dy_, dx_):
            value, gate = x_[:, :d], x_[:, d:]
            cdf = normal_cdf(gate)
            slope = _normal_density(gate)
            slope *= gate
            slope += cdf
            slope *= value
            cdf *= gate
            xp.multiply(dy_, cdf, out=dx_[:, :d])
            xp.multiply(dy_, slope, out=dx_[:, d:])

        each_piece(piece, as_rows(x), as_rows(dy), as_rows(dx))
        return dx

    return y, backward


def _normal_density(x):
    y = x * x
    y *= -0.5
    y = array_module(x).exp(y)
    y *= 1 / math.sqrt(2 * math.pi)
    return y


# erf(x/√2) = tanh(x P(x²)). The coefficients of P, lowest first, are the weighted minimax fit on
# |x| ≤ 5.6 that tests/test_activations.py repeats; in float32 the error stays below 1.5e-7.
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
    """Φ(x) = ½ (1 + erf(x/√2)): exact but slow in float64, within 1e-7 and fast in float32."""
    if x.dtype != "float32":
        return 0.5 * (1 + erf(x * math.sqrt(0.5)))
    xp = array_module(x)
    x = xp.clip(x, -6, 6)  # beyond, Φ is 0 or 1 to the last bit
    square = x * x
    y = square * _CDF_COEFFICIENTS[-1]
    for coefficient in _CDF_COEFFICIENTS[-2:0:-1]:
        y += coefficient
        y *= square
    y += _CDF_COEFFICIENTS[0]
    y *= x
    xp.tanh(y, out=y)
    y *= 0.5
    y += 0.5
    return y
