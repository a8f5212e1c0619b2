"""Activations in blocks that fit the cache, on all cores; twins of `nn.activations`.

GELU and GEGLU take a fast normal distribution in float32.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from tinyldm.backend import Array
from tinyldm.kernels.blocking import each_block, whole_rows
from tinyldm.kernels.registry import kernel
from tinyldm.nn import activations
from tinyldm.nn.protocol import Backward, is_recording


def in_blocks(name: str, f: Callable, derivative: Callable) -> Callable:
    """Make a kernel of the `elementwise` function `name`: f and f′ of one block at a time."""

    def apply(x):
        y = np.empty(x.shape, x.dtype)

        def forward(x_, y_):
            y_[...] = f(x_)

        each_block(forward, _rows(x), _rows(y))

        def backward(dy):
            dx = np.empty(x.shape, x.dtype)

            def block(x_, dy_, dx_):
                np.multiply(dy_, derivative(x_), out=dx_)

            each_block(block, _rows(x), _rows(dy), _rows(dx))
            return dx

        return y, backward

    apply.__name__ = name
    return kernel(f"nn.activations.{name}")(apply)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


silu, quick_gelu, leaky_relu = (
    in_blocks(plain.__name__, plain.f, plain.derivative)
    for plain in (activations.silu, activations.quick_gelu, activations.leaky_relu)
)


@kernel("nn.activations.geglu")
def geglu(x: Array) -> tuple[Array, Backward]:
    """Compute value · gate Φ(gate), block by block; Φ(gate) is kept for the backward pass."""
    d = x.shape[-1] // 2
    y = np.empty((*x.shape[:-1], d), x.dtype)
    recording = is_recording()
    kept = np.empty_like(y) if recording else y

    def block(x_, y_, kept_):
        value, gate = x_[:, :d], x_[:, d:]
        cdf = normal_cdf(gate)
        if recording:
            kept_[...] = cdf
        cdf *= gate
        np.multiply(value, cdf, out=y_)

    with whole_rows(d):
        each_block(block, _rows(x), _rows(y), _rows(kept))

    def backward(dy):
        dx = np.empty(x.shape, x.dtype)

        def block(x_, dy_, dx_, cdf):
            value, gate = x_[:, :d], x_[:, d:]
            slope = _slope(gate, cdf)
            slope *= value
            np.multiply(dy_, slope, out=dx_[:, d:])
            np.multiply(cdf, gate, out=slope)
            np.multiply(dy_, slope, out=dx_[:, :d])

        with whole_rows(d):
            each_block(block, _rows(x), _rows(dy), _rows(dx), _rows(kept))
        return dx

    return y, backward


def _slope(x, cdf):
    """Compute the derivative of GELU, Φ(x) + x φ(x), for a known Φ(x)."""
    y = x * x
    y *= -0.5
    y = np.exp(y)
    y *= 1 / math.sqrt(2 * math.pi)
    y *= x
    y += cdf
    return y


@functools.cache
def _exp_is_faster():
    """Return whether NumPy's exp takes half the time of its tanh: on x86 up to AVX2."""
    loops = np.lib.introspect.opt_func_info(func_name="^tanh$", signature="float32")
    chosen = loops.get("tanh", {}).get("ff", {}).get("current", "")
    return "AVX2" in chosen or "X86_V3" in chosen  # in older NumPy, and in newer


def one_plus_tanh(x: Array, out: Array) -> None:
    """Compute 1 + tanh(x), which is 2 σ(2x), into `out`; it may be x."""
    if x.dtype == "float32" and _exp_is_faster():
        with np.errstate(over="ignore"):  # 2 / (1 + ∞) is 0, as it should be
            np.exp(np.multiply(x, -2, out=out), out=out)
        out += 1
        np.divide(2, out, out=out)
    else:
        np.tanh(x, out=out)
        out += 1


# erf(x/√2) = tanh(x P(x²)). The coefficients of P, lowest first, are the weighted minimax fit on
# |x| ≤ 5.6 that tests/kernels/test_activations.py repeats; in float32 the error stays below 1.5e-7.
_CDF_COEFFICIENTS = (
    7.97884941e-01, 3.63330846e-02, -3.25949754e-05, -5.53061938e-05, 3.96474443e-06,
    -1.32263341e-07, 1.75617078e-09,
)  # fmt: skip


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
    one_plus_tanh(y, out=y)
    y *= 0.5
    return y


gelu = in_blocks("gelu", lambda x: x * normal_cdf(x), lambda x: _slope(x, normal_cdf(x)))
