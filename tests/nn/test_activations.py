"""The activations: their symmetries, their ends, and the normal distribution inside GELU."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import chebyshev, polynomial
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


@given(x=vectors, slope=st.floats(0.01, 0.99))
def test_leaky_relu_keeps_the_sign_and_is_undone_by_its_inverse(x, slope):
    y, backward = activations.leaky_relu(x, slope)
    assert np.array_equal(np.sign(y), np.sign(x))
    assert_near(np.maximum(y, 0) + np.minimum(y, 0) / slope, x)
    assert np.array_equal(backward(np.ones_like(x)), np.where(x > 0, 1, slope))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_leaky_relu_far_out_and_at_zero(dtype):
    x = np.array([[-1e4, 0, 1e4]], dtype)
    y, backward = activations.leaky_relu(x, 0.5)
    assert np.array_equal(y, [[-5e3, 0, 1e4]]) and y.dtype == dtype
    dx = backward(np.ones_like(x))
    assert np.array_equal(dx, [[0.5, 0.5, 1]]) and dx.dtype == dtype


@given(x=vectors, gate=vectors)
def test_geglu_is_a_value_times_the_gelu_of_a_gate(x, gate):
    y, _ = activations.geglu(np.concatenate([x, gate], axis=1))
    assert_near(y, x * activations.gelu(gate)[0])


def test_normal_cdf_in_float32():
    far = np.array([20, 1e4, 3e38, np.inf])
    x = np.concatenate([np.linspace(-8, 8, 400_001), far, -far]).astype("float32")
    cdf = activations.normal_cdf(x)
    assert cdf.dtype == "float32"
    assert np.abs(cdf - special.ndtr(x.astype("float64"))).max() < 1.5e-7
    assert (cdf >= 0).all() and (cdf <= 1).all()


def test_normal_cdf_in_float64():
    x = np.concatenate([np.linspace(-40, 40, 10_001), [-1e300, 1e300, -np.inf, np.inf]])
    assert np.abs(activations.normal_cdf(x) - special.ndtr(x)).max() < 3e-16


def test_the_coefficients_of_normal_cdf_are_the_minimax_fit():
    """Look for P with erf(x/√2) ≈ tanh(x P(x²)) on 0…5.6, that is P(x²) = artanh(erf(x/√2)) / x.

    A change δ of P changes erf by its slope: (1 − erf²) x δ = erfc (2 − erfc) x δ. Least squares
    with these weights, and again with each point's weight multiplied by its error, converges to
    the P with the smallest maximal error (Lawson 1961).
    """
    end, degree = 5.6, len(activations._CDF_COEFFICIENTS) - 1
    x = end * np.sin(np.linspace(0, np.pi / 2, 601))[1:]
    erfc = special.erfc(x / math.sqrt(2))
    wanted = 0.5 * np.log((2 - erfc) / erfc) / x
    slope = erfc * (2 - erfc) * x
    # In Chebyshev polynomials of x², moved to −1…1, the equations are well conditioned.
    basis = chebyshev.chebvander(2 * (x / end) ** 2 - 1, degree)
    weight = np.ones_like(x)
    for _ in range(80):
        row = np.sqrt(weight) * slope
        fit = np.linalg.lstsq(basis * row[:, None], wanted * row, rcond=None)[0]
        error = np.abs(slope * (basis @ fit - wanted))
        weight *= error / error.max()
    stored = np.abs(
        slope * (polynomial.polyval(x**2, activations._CDF_COEFFICIENTS) - wanted)
    ).max()
    assert degree == 6
    assert error.max() < 6e-8  # of erf, so half of it for the normal distribution
    assert 0.99 * error.max() < stored < 1.02 * error.max()
