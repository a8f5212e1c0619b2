"""Winograd's algorithm: exact in its matrices, near in float32, the same however it is cut.

tests/kernels/test_kernels.py compares it with its plain twin and checks its gradients.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import in_blocks, random_array, seeds

from tinyldm.kernels.cpu import winograd
from tinyldm.kernels.im2col import im2col


@pytest.mark.parametrize("m", winograd.POINTS)
@given(seed=seeds)
def test_the_matrices_correlate(m, seed):
    """In two dimensions, on flat tiles: y = Aᵀ [(Bᵀ x B) ⊙ (G w Gᵀ)] A, and dw from dy."""
    rng = np.random.default_rng(seed)
    x, w, dy = (random_array(rng, (side, side)) for side in (m + 2, 3, m))

    def transformed(name, z):
        return winograd._transform_matrix(name, m, np, "d") @ z.reshape(-1)

    tile = transformed("input", x)
    y = transformed("output", tile * transformed("kernel", w)).reshape(m, m)
    dw = transformed("dkernel", tile * transformed("doutput", dy)).reshape(3, 3)
    for i, j in np.ndindex(m, m):
        np.testing.assert_allclose(y[i, j], (x[i : i + 3, j : j + 3] * w).sum(), atol=1e-13)
    for i, j in np.ndindex(3, 3):
        np.testing.assert_allclose(dw[i, j], (x[i : i + m, j : j + m] * dy).sum(), atol=1e-13)


@pytest.mark.parametrize(
    "conv2d, tol",
    [(winograd.CONVOLUTIONS[4], 5e-6), (winograd.CONVOLUTIONS[2], 2e-6), (im2col, 2e-6)],
)
@pytest.mark.parametrize("c", [32, 320])
def test_the_error_of_float32(conv2d, tol, c):
    """Of the largest value: Winograd's sums of differences cost a digit at most."""
    rng = np.random.default_rng(c)
    x, dy = rng.standard_normal((2, 1, 16, 16, c))
    w = rng.standard_normal((3, 3, c, c)) / (3 * np.sqrt(c))
    results = []
    for dtype in ("float64", "float32"):
        y, backward = conv2d(x.astype(dtype), w.astype(dtype))
        results.append([y, *backward(dy.astype(dtype))[:2]])
    for exact, z in zip(*results, strict=True):
        assert z.dtype == "float32"
        assert np.abs(z - exact).max() <= tol * np.abs(exact).max()


@pytest.mark.parametrize("conv2d", winograd.CONVOLUTIONS.values())
@given(seeds, st.integers(1, 9), st.sampled_from([1, 10, 300, 10**6]))
def test_the_number_of_kernels_at_a_time_moves_only_the_rounding(conv2d, seed, c_out, size):
    """One tile, so that the kernels are cut."""
    rng = np.random.default_rng(seed)
    x, w, b = (random_array(rng, shape) for shape in [(1, 2, 2, 3), (3, 3, 3, c_out), (c_out,)])
    y, backward = conv2d(x, w, b)
    with in_blocks(size):
        y_cut, backward_cut = conv2d(x, w, b)
        gradients_cut = backward_cut(y)
    for z, z_cut in zip((y, *backward(y)), (y_cut, *gradients_cut), strict=True):
        np.testing.assert_allclose(z, z_cut, atol=1e-13)
