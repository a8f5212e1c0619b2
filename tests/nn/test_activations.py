"""The activations: their symmetries, their ends, and the normal distribution inside GELU."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_near
from scipy import special
from strategies import seeds

from tinyldm.nn import activations

vectors = st.builds(lambda seed: np.random.default_rng(seed).normal(0, 3, (5, 7)), seeds)
ACTIVATIONS = {
    "silu": activations.silu,
    "quick_gelu": activations.quick_gelu,
    "gelu": activations.gelu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(x=vectors)
def test_activations_are_odd_but_for_half_of_x(name, x):
    # x s(x) with s(x) + s(−x) = 1, so f(x) − f(−x) = x.
    y, _ = ACTIVATIONS[name](x)
    mirrored, _ = ACTIVATIONS[name](-x)
    assert_near(y - mirrored, x)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_far_out_and_at_zero(name, dtype):
    x = np.array([[-1e4, -100, 0, 100, 1e4]], dtype)
    y, backward = ACTIVATIONS[name](x)
    assert np.array_equal(y, [[0, 0, 0, 100, 1e4]])
    assert np.array_equal(backward(np.ones_like(x)), [[0, 0, 0.5, 1, 1]])


@given(x=vectors)
def test_leaky_relu_keeps_the_sign_and_is_undone_by_its_inverse(x):
    slope = activations.LEAKY_SLOPE
    y, backward = activations.leaky_relu(x)
    assert np.array_equal(np.sign(y), np.sign(x))
    assert_near(np.maximum(y, 0) + np.minimum(y, 0) / slope, x)
    assert np.array_equal(backward(np.ones_like(x)), np.where(x > 0, 1, slope))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_leaky_relu_far_out_and_at_zero(dtype):
    x = np.array([[-1e4, 0, 1e4]], dtype)
    y, backward = activations.leaky_relu(x)
    assert_near(y, [[-2e3, 0, 1e4]], tol=1e-7)
    dx = backward(np.ones_like(x))
    assert_near(dx, [[0.2, 0.2, 1]], tol=1e-7)
    assert y.dtype == dx.dtype == dtype


@given(x=vectors, gate=vectors)
def test_geglu_is_a_value_times_the_gelu_of_a_gate(x, gate):
    y, _ = activations.geglu(np.concatenate([x, gate], axis=1))
    assert_near(y, x * activations.gelu(gate)[0])


def test_normal_cdf_in_float64():
    x = np.concatenate([np.linspace(-40, 40, 10_001), [-1e300, 1e300, -np.inf, np.inf]])
    assert np.abs(activations.normal_cdf(x) - special.ndtr(x)).max() < 3e-16
