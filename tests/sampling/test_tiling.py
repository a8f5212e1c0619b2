"""Work tile by tile: what does not look around is the same, and no tile is too large."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_cases import numbers

from tinyldm.sampling.tiling import in_tiles

SIDES = st.integers(1, 40)


def double(x):
    """(n, h, w, c) → (n, 2h, 2w, c), position by position."""
    return np.square(x).repeat(2, axis=1).repeat(2, axis=2)


@given(h=SIDES, w=SIDES, side=st.integers(2, 20))
def test_position_by_position_it_is_exact(h, w, side):
    x = numbers("x", 2, h, w, 3)
    seen = []

    def function(x):
        seen.append(x.shape)
        return double(x)

    y = in_tiles(function, x, (h, w), side)
    np.testing.assert_allclose(y, double(x), rtol=1e-12)
    assert all(shape[1] == min(h, side) and shape[2] == min(w, side) for shape in seen)


@given(h=SIDES, w=SIDES, side=st.integers(2, 20))
def test_downwards(h, w, side):
    x = numbers("x", 1, 4 * h, 4 * w, 2)

    def quarter(x):
        return x[:, ::4, ::4]

    np.testing.assert_allclose(in_tiles(quarter, x, (h, w), side), quarter(x), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_tile_is_the_whole(dtype):
    x = numbers("x", 1, 7, 9, 3).astype(dtype)
    y = in_tiles(double, x, (7, 9), 9)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, double(x))


@given(h=st.integers(20, 60), side=st.integers(8, 19))
def test_seams_are_blended(h, side):
    """Of tiles that differ by an offset each, neighbouring positions differ by a fraction of it."""
    count = 0

    def offset(x):
        nonlocal count
        count += 1
        return x * 0 + count

    y = in_tiles(offset, np.zeros((1, h, 4, 1)), (h, 4), side)
    steps = np.abs(np.diff(y[0, :, 0, 0]))
    assert steps.max() < 0.75 and (y >= 1).all() and (y <= count).all()
    assert abs(y[0, 0, 0, 0] - 1) < 1e-12 and abs(y[0, -1, 0, 0] - count) < 1e-12
