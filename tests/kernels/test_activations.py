"""The fast normal distribution inside GELU: near the true one, and the best of its kind."""

import math

import numpy as np
import pytest
from numpy.polynomial import chebyshev, polynomial
from scipy import special

from tinyldm.kernels.cpu import activations


@pytest.fixture(params=["tanh", "exp"])
def loop(request, monkeypatch):
    """Which of NumPy's loops is taken: on each machine both must be right."""
    monkeypatch.setattr(activations, "_exp_is_faster", lambda: request.param == "exp")


@pytest.mark.parametrize("dtype, tol", [("float32", 4e-7), ("float64", 1e-15)])
def test_one_plus_tanh(loop, dtype, tol):
    x = np.concatenate([np.linspace(-12, 12, 100_001), [-1e4, -1e30, 1e4, 1e30]]).astype(dtype)
    before, found = x.copy(), np.empty_like(x)
    activations.one_plus_tanh(x, out=found)
    assert found.dtype == dtype and np.array_equal(x, before)
    assert np.abs(found - 2 * special.expit(2 * x.astype("float64"))).max() < tol
    activations.one_plus_tanh(x, out=x)
    assert np.array_equal(x, found)


@pytest.mark.parametrize(
    "chosen, faster",
    [("X86_V4", False), ("AVX512_SKX", False), ("X86_V3", True), ("FMA3__AVX2", True),
     ("baseline(NEON_VFPV4)", False), (None, False)],
)  # fmt: skip
def test_exp_is_faster_on_avx2_alone(monkeypatch, chosen, faster):
    found = {"tanh": {"ff": {"current": chosen}}} if chosen else {}
    monkeypatch.setattr(np.lib.introspect, "opt_func_info", lambda **_: found)
    assert activations._exp_is_faster.__wrapped__() == faster


def test_normal_cdf_in_float32(loop):
    far = np.array([20, 1e4, 3e38, np.inf])
    x = np.concatenate([np.linspace(-8, 8, 400_001), far, -far]).astype("float32")
    cdf = activations.normal_cdf(x)
    assert cdf.dtype == "float32"
    assert np.abs(cdf - special.ndtr(x.astype("float64"))).max() < 1.5e-7
    assert (cdf >= 0).all() and (cdf <= 1).all()


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
    stored = polynomial.polyval(x**2, activations._CDF_COEFFICIENTS)
    stored = np.abs(slope * (stored - wanted)).max()
    assert degree == 6
    assert error.max() < 6e-8  # of erf, so half of it for the normal distribution
    assert 0.99 * error.max() < stored < 1.02 * error.max()
