"""Activations: functions of one element at a time, x (..., d) → (..., d).

As in `functional`, each works in float32, float64 and complex128, with its backward pass.
"""

import functools
import math
from collections.abc import Callable

from tinyldm.backend import Array, array_module, erf
from tinyldm.nn.protocol import Backward, differentiable

LEAKY_SLOPE = 0.2  # of leaky_relu below 0, as in pix2pix's discriminator


def elementwise(derivative: Callable[[Array], Array]) -> Callable:
    """Make a differentiable function of f, which maps each element by itself, given f′.

    The chain rule for one element: y = f(x), dx = dy · f′(x).
    """

    def make(f):
        @differentiable
        @functools.wraps(f)
        def apply(x: Array) -> tuple[Array, Backward]:
            def backward(dy):
                return dy * derivative(x)

            return f(x), backward

        apply.f, apply.derivative = f, derivative  # from which kernels make faster versions
        return apply

    return make


def sigmoid(x: Array) -> Array:
    """Sigmoid σ(x) = 1 / (1 + e⁻ˣ), computed as ½ + ½ tanh(x/2), which cannot overflow."""
    return 0.5 + 0.5 * array_module(x).tanh(0.5 * x)


def normal_cdf(x: Array) -> Array:
    """Standard normal distribution function, Φ(x) = ½ (1 + erf(x/√2))."""
    return 0.5 * (1 + erf(x * math.sqrt(0.5)))


def silu_derivative(x: Array) -> Array:
    """Derivative of silu: σ(x) (1 + x (1 − σ(x)))."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


@elementwise(silu_derivative)
def silu(x: Array) -> Array:
    """SiLU: y = x σ(x) (Ramachandran et al. 2017, "Searching for activation functions")."""
    return x * sigmoid(x)


def quick_gelu_derivative(x: Array) -> Array:
    """Derivative of quick_gelu: σ(1.702 x) (1 + 1.702 x (1 − σ(1.702 x)))."""
    return silu_derivative(1.702 * x)


@elementwise(quick_gelu_derivative)
def quick_gelu(x: Array) -> Array:
    """CLIP's approximation of GELU: y = x σ(1.702 x) (Hendrycks & Gimpel 2016, section 2)."""
    return x * sigmoid(1.702 * x)


def gelu_derivative(x: Array) -> Array:
    """Derivative of gelu: Φ(x) + x φ(x), with the normal density φ(x) = e^(−x²/2) / √(2π)."""
    density = array_module(x).exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return normal_cdf(x) + x * density


@elementwise(gelu_derivative)
def gelu(x: Array) -> Array:
    """GELU: y = x Φ(x), with Φ the exact normal distribution (Hendrycks & Gimpel 2016, sec. 2)."""
    return x * normal_cdf(x)


def leaky_relu_derivative(x: Array) -> Array:
    """Derivative of leaky_relu: 1 where x > 0, elsewhere LEAKY_SLOPE, also at 0."""
    return array_module(x).where(x.real > 0, 1.0, LEAKY_SLOPE).astype(x.dtype)


@elementwise(leaky_relu_derivative)
def leaky_relu(x: Array) -> Array:
    """Leaky ReLU: y = x where x > 0, elsewhere LEAKY_SLOPE · x (Maas et al. 2013)."""
    return x * leaky_relu_derivative(x)


@differentiable
def geglu(x: Array) -> tuple[Array, Backward]:
    """GEGLU: value · gelu(gate), x = [value, gate] (..., 2d) → (..., d) (Shazeer 2020, eq. 5)."""
    d = x.shape[-1] // 2
    value, gate = x[..., :d], x[..., d:]
    activated, gelu_back = gelu(gate)

    def backward(dy):
        return array_module(x).concatenate([dy * activated, gelu_back(dy * value)], axis=-1)

    return value * activated, backward
