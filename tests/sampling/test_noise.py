"""Noise of sampling, and the way between two noises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.sampling.noise import draw, slerp, streams

AMOUNTS = st.floats(0, 1)


def normal(seed, n=2, shape=(4, 4, 3)):
    return draw(streams(seed, n), shape)


def test_a_stream_depends_on_seed_and_index_alone():
    three, five = (draw(streams(7, n), (2, 3)) for n in (3, 5))
    np.testing.assert_array_equal(three, five[:3])
    assert len({x.tobytes() for x in five}) == 5
    assert three.dtype == np.float32
    again = streams(7, 3)
    np.testing.assert_array_equal(draw(again, (2, 3)), three)
    assert (draw(again, (2, 3)) != three).all()


@given(seed=st.integers(0, 99), amount=AMOUNTS)
def test_between_normal_noises_it_goes_along_the_circle(seed, amount):
    a, b = normal(seed), normal(seed + 100)
    x = slerp(a, b, amount)
    assert x.shape == a.shape and x.dtype == a.dtype
    np.testing.assert_allclose(x, slerp(b, a, 1 - amount), atol=1e-5)
    for one, start, end in zip(x, a, b, strict=True):
        lengths = sorted(map(np.linalg.norm, (start, end)))
        # The straight line would be shorter by up to a third.
        assert 0.95 * lengths[0] <= np.linalg.norm(one) <= 1.05 * lengths[1]


@given(seed=st.integers(0, 99), amount=AMOUNTS)
def test_of_equal_lengths_it_keeps_them_and_divides_the_angle(seed, amount):
    a, b = (x.astype(float) for x in (normal(seed), normal(seed + 100)))
    b *= np.sqrt(np.square(a).sum((1, 2, 3)) / np.square(b).sum((1, 2, 3)))[:, None, None, None]
    for one, start, end in zip(slerp(a, b, amount), a, b, strict=True):
        np.testing.assert_allclose(np.linalg.norm(one), np.linalg.norm(start))
        angle, whole = (_angle(start, other) for other in (one, end))
        np.testing.assert_allclose(angle, amount * whole, atol=1e-6)


def _angle(a, b):
    cosine = (a.astype(float) * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    return np.arccos(np.clip(cosine, -1, 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_its_ends(dtype):
    a, b = normal(1).astype(dtype), normal(2).astype(dtype)
    np.testing.assert_allclose(slerp(a, b, 0), a, rtol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 1), b, rtol=1e-6)


@given(amount=AMOUNTS)
def test_equal_and_opposite_noises(amount):
    a = normal(3)
    np.testing.assert_allclose(slerp(a, a, amount), a, rtol=1e-5)
    np.testing.assert_allclose(slerp(a, 2 * a, amount), (1 + amount) * a, rtol=1e-4)
    assert np.isfinite(slerp(a, -a, amount)).all()
