"""Convolution: against seven loops, and the laws that every convolution obeys."""

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_near
from strategies import conv_calls, random_array, seeds, sizes

from tinyldm.nn.conv import conv2d
from tinyldm.nn.functional import linear


@given(conv_calls())
def test_equals_seven_loops_forward_and_backward(call):
    x, w, *b = call.arrays()
    y, backward = call(x, w, *b)
    dy = random_array(np.random.default_rng(call.seed + 1), y.shape)
    dx, dw, db = backward(dy)
    assert_near(y, reference.conv2d(x, w, *b, **call.options))
    dx_expected, dw_expected, db_expected = reference.conv2d_backward(dy, x, w, **call.options)
    assert_near(dx, dx_expected)
    assert_near(dw, dw_expected)
    if b:
        assert_near(db, db_expected)
    else:
        assert db is None


# --------------------------------------------------------------------------------------------- laws


@given(conv_calls())
def test_one_number_three_ways(call):
    # ⟨conv(x, w), dy⟩ = ⟨x, dx⟩ = ⟨w, dw⟩: the backward passes are the adjoints of the forward one.
    x, w, *_ = call.arrays()
    y, backward = call(x, w)
    dy = random_array(np.random.default_rng(call.seed + 1), y.shape)
    dx, dw, _ = backward(dy)
    terms = np.abs(y * dy).sum() + np.abs(x * dx).sum() + np.abs(w * dw).sum()
    assert abs((y * dy).sum() - (x * dx).sum()) <= 1e-13 * terms
    assert abs((y * dy).sum() - (w * dw).sum()) <= 1e-13 * terms


@given(st.tuples(sizes, sizes, sizes, sizes), seeds, st.integers(0, 4), st.integers(0, 4))
def test_a_kernel_with_a_single_one_moves_the_image(shape, seed, i, j):
    x = random_array(np.random.default_rng(seed), shape)
    w = np.zeros((5, 5, shape[3], shape[3]))
    w[i, j] = np.eye(shape[3])
    y, _ = conv2d(x, w, padding=2)
    padded = np.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)])
    assert np.array_equal(y, padded[:, i : i + shape[1], j : j + shape[2]])


@given(st.tuples(sizes, sizes, sizes, sizes), sizes, seeds)
def test_a_kernel_of_one_pixel_is_a_linear_layer(shape, c_out, seed):
    rng = np.random.default_rng(seed)
    x, w, b = (random_array(rng, s) for s in [shape, (1, 1, shape[3], c_out), (c_out,)])
    y, conv_back = conv2d(x, w, b, padding=0)
    expected, linear_back = linear(x, w[0, 0].T, b)
    assert_near(y, expected)
    (dx, dw, db), (dx_expected, dw_expected, db_expected) = conv_back(y), linear_back(y)
    assert_near(dx, dx_expected)
    assert_near(dw[0, 0].T, dw_expected)
    assert_near(db, db_expected)


@given(conv_calls(), st.floats(-3, 3))
def test_linear_in_the_image_and_in_the_kernel(call, factor):
    x, w, *_ = call.arrays()
    rng = np.random.default_rng(call.seed + 1)
    x2, w2 = random_array(rng, x.shape), random_array(rng, w.shape)
    y = call(x, w)[0]
    assert_near(call(x + factor * x2, w)[0], y + factor * call(x2, w)[0])
    assert_near(call(x, w + factor * w2)[0], y + factor * call(x, w2)[0])


@given(conv_calls(), st.integers(1, 3), st.integers(1, 3))
def test_a_moved_image_gives_a_moved_result(call, down, right):
    # Above and to the left of the image lie zeros alone, before and after.
    x, w, *b = call.arrays()
    stride = call.options["stride"]
    _, below, _, beside = reference.four_sides(call.options["padding"])
    padding = (w.shape[0] - 1, below, w.shape[1] - 1, beside)
    y, _ = conv2d(x, w, *b, stride=stride, padding=padding)
    moved = np.pad(x, [(0, 0), (down * stride, 0), (right * stride, 0), (0, 0)])
    y_moved, _ = conv2d(moved, w, *b, stride=stride, padding=padding)
    y_moved -= b[0] if b else 0
    assert_near(y_moved[:, down:, right:], y - (b[0] if b else 0))
    assert not y_moved[:, :down].any()
    assert not y_moved[:, :, :right].any()


@st.composite
def circles(draw):
    """An image, the same image continued around a circle, a kernel, and the kernel's reach."""
    reach, rng = draw(st.integers(0, 2)), np.random.default_rng(draw(seeds))
    h, w = draw(st.integers(5, 8)), draw(st.integers(5, 8))
    x = random_array(rng, (draw(st.integers(1, 2)), h, w, draw(sizes)))
    kernel = random_array(rng, (2 * reach + 1, 2 * reach + 1, x.shape[3], draw(sizes)))
    return x, around(x, reach), kernel, reach


def around(x, reach):
    return np.pad(x, [(0, 0), (reach, reach), (reach, reach), (0, 0)], mode="wrap")


@given(circles())
def test_on_a_circle_it_is_a_product_of_frequencies(circle):
    x, continued, w, reach = circle
    waves = np.fft.fft2(x, axes=(1, 2))
    kernel_waves = np.fft.fft2(w, x.shape[1:3], axes=(0, 1)).conj()  # conj: not flipped
    products = np.einsum("nhwi,hwio->nhwo", waves, kernel_waves)
    expected = np.roll(np.fft.ifft2(products, axes=(1, 2)).real, (reach, reach), (1, 2))
    assert_near(conv2d(continued, w, padding=0)[0], expected)


@given(circles(), st.integers(-4, 4), st.integers(-4, 4))
def test_on_a_circle_a_turned_image_gives_a_turned_result(circle, down, right):
    x, continued, w, reach = circle
    y, _ = conv2d(continued, w, padding=0)
    turned, _ = conv2d(around(np.roll(x, (down, right), (1, 2)), reach), w, padding=0)
    assert_near(turned, np.roll(y, (down, right), (1, 2)), tol=1e-14)


@given(circles())
def test_the_padding_is_seen_no_further_than_the_kernel_reaches(circle):
    x, continued, w, reach = circle
    around_it, _ = conv2d(continued, w, padding=0)
    alone, _ = conv2d(x, w, padding=reach)
    inside = (slice(None), *(slice(reach, size - reach) for size in x.shape[1:3]))
    assert_near(alone[inside], around_it[inside], tol=1e-14)
    outside = np.ones(alone.shape, bool)
    outside[inside] = False
    assert (alone[outside] != around_it[outside]).all()


@given(conv_calls(), seeds)
def test_the_order_of_the_channels_does_not_matter(call, seed):
    x, w, *b = call.arrays()
    rng = np.random.default_rng(seed)
    channels_in, channels_out = rng.permutation(w.shape[2]), rng.permutation(w.shape[3])
    y, _ = call(x, w, *b)
    shuffled = w[:, :, channels_in][..., channels_out]
    y_shuffled, _ = call(x[..., channels_in], shuffled, *(bias[channels_out] for bias in b))
    assert_near(y_shuffled, y[..., channels_out])


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(1, 4, 4, 2), (4, 4, 3), (1, 1, 4, 4, 3), (3,)])
def test_an_image_that_does_not_fit_the_kernel_is_refused(shape):
    with pytest.raises(ValueError, match=r"conv2d: expected x \(n, h, w, 3\), found \("):
        conv2d(np.zeros(shape), np.zeros((3, 3, 3, 5)))


@pytest.mark.parametrize("h, w, padding", [(2, 9, 0), (9, 2, 0), (1, 9, (1, 0, 0, 0))])
def test_an_image_smaller_than_the_kernel_is_refused(h, w, padding):
    with pytest.raises(ValueError, match=f"3×3 kernel does not fit into {h}×{w} pixels"):
        conv2d(np.zeros((1, h, w, 1)), np.zeros((3, 3, 1, 1)), padding=padding)
    # With stride, rounding down must not turn a negative size into an allowed one.
    with pytest.raises(ValueError, match="does not fit"):
        conv2d(np.zeros((1, h, w, 1)), np.zeros((3, 3, 1, 1)), padding=padding, stride=4)
