"""Matrix products: the same however they are cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.kernels import matmul
from tinyldm.kernels.matmul import product, spread


@pytest.mark.parametrize("has_small", [True, False])
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 80),
    st.integers(1, 100),
    st.sampled_from([1, 5, 64, 128]),
    st.booleans(),
    st.booleans(),
)
def test_product_is_the_matrix_product_however_it_is_cut(
    has_small, lead, m, k, n, a_turned, b_turned
):
    rng = np.random.default_rng(m)
    a = rng.standard_normal((*lead, k, m)).swapaxes(-1, -2) if a_turned else None
    a = rng.standard_normal((*lead, m, k)) if a is None else a
    b = rng.standard_normal((*lead, n, k)).swapaxes(-1, -2) if b_turned else None
    b = rng.standard_normal((*lead, k, n)) if b is None else b
    out = np.full((*lead, m, n), np.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "has_small_products", lambda: has_small)
        patch.setattr(matmul, "SMALL", 32 * 64 * 20 - 1)  # the limit lies within the sizes
        product(a, b, out)
    assert np.allclose(out, a @ b, rtol=1e-13, atol=1e-13)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 40), st.sampled_from([1, 7, 1024]))
def test_spread_is_the_matrix_product(p, q, n, strip):
    rng = np.random.default_rng(p)
    matrix, x = rng.standard_normal((p, q)), rng.standard_normal((q, n))
    out = np.full((p, n), np.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "STRIPS", (strip, 3))
        spread(matrix, x, out)
    assert np.allclose(out, matrix @ x, rtol=1e-13, atol=1e-13)
