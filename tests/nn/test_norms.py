"""The normalisations: what their definition says of their result, and of its gradient.

With all other functions, tests/nn/test_functional.py compares them with loops and checks gradients.
"""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_near
from strategies import group_norm_calls, random_array, seeds

from tinyldm.nn.norms import group_norm, layer_norm, unit_norm


def by_group(x, groups):
    """(n, ..., c) → (n, groups, all else)."""
    x = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    return x.swapaxes(1, 2).reshape(x.shape[0], groups, -1)


@given(group_norm_calls())
def test_group_norm_has_the_moments_of_its_definition(call):
    x, w, b = call.arrays()
    groups, eps = call.options["groups"], call.options["eps"]
    y, _ = call(x, np.ones_like(w), np.zeros_like(b))
    values, variance = by_group(y, groups), by_group(x, groups).var(axis=2)
    assert_near(values.mean(axis=2), np.zeros(values.shape[:2]))
    assert_near(values.var(axis=2), variance / (variance + eps))


@given(group_norm_calls(), st.floats(0.1, 10), st.floats(-10, 10))
def test_group_norm_undoes_a_scale_if_eps_has_it_too(call, scale, shift):
    x, w, b = call.arrays()
    groups, eps = call.options["groups"], call.options["eps"]
    moved, _ = group_norm(scale * x + shift, w, b, groups, eps * scale**2)
    assert_near(moved, call(x, w, b)[0], tol=1e-10)


@given(group_norm_calls())
def test_group_norm_gradient_loses_two_directions(call):
    # Of a group: Σ dx = 0 and Σ dx x̂ = rstd Σ (w dy) x̂ · eps / (variance + eps). A term forgotten
    # in dx breaks one or the other.
    x, w, b = call.arrays()
    groups, eps = call.options["groups"], call.options["eps"]
    y, backward = call(x, w, b)
    dy = random_array(np.random.default_rng(call.seed + 1), y.shape)
    dx, _, _ = backward(dy)
    x_, dx_, wdy_ = (by_group(a, groups) for a in (x, dx, w * dy))
    variance = x_.var(axis=2)
    rstd = 1 / np.sqrt(variance + eps)
    normal = (x_ - x_.mean(axis=2, keepdims=True)) * rstd[..., None]
    terms = rstd * np.abs(wdy_).sum(axis=2)
    assert (np.abs(dx_.sum(axis=2)) <= 1e-12 * terms).all()
    expected = rstd * (wdy_ * normal).sum(axis=2) * eps / (variance + eps)
    assert (np.abs((dx_ * normal).sum(axis=2) - expected) <= 1e-12 * terms).all()


@given(group_norm_calls())
def test_groups_do_not_meet(call):
    x, w, b = call.arrays()
    groups, eps = call.options["groups"], call.options["eps"]
    parts = zip(*(np.split(a, groups, axis=-1) for a in (x, w, b)), strict=True)
    alone = [group_norm(*part, 1, eps)[0] for part in parts]
    assert_near(np.concatenate(alone, axis=-1), call(x, w, b)[0])


@given(group_norm_calls(), seeds)
def test_group_norm_does_not_see_where_a_pixel_lies(call, seed):
    x, w, b = call.arrays()
    x = x.reshape(len(x), -1, x.shape[-1])
    places = np.random.default_rng(seed).permutation(x.shape[1])
    dy = random_array(np.random.default_rng(seed), x.shape)
    y, backward = call(x, w, b)
    moved, moved_back = call(x[:, places], w, b)
    assert_near(moved, y[:, places], tol=1e-11)
    for moved_gradient, gradient in zip(moved_back(dy[:, places]), backward(dy), strict=True):
        expected = gradient[:, places] if gradient.ndim == 3 else gradient
        assert_near(moved_gradient, expected, tol=1e-11)


@given(group_norm_calls())
def test_a_single_group_is_a_layer_norm_of_the_whole_image(call):
    x, w, b = call.arrays()
    everywhere = (np.broadcast_to(a, x.shape[1:]).ravel() for a in (w, b))
    flat, _ = layer_norm(x.reshape(len(x), -1), *everywhere, call.options["eps"])
    assert_near(group_norm(x, w, b, 1, call.options["eps"])[0], flat.reshape(x.shape), tol=1e-11)


@pytest.mark.parametrize("name", ["group_norm", "layer_norm"])
@given(seed=seeds, far=st.sampled_from([-1e4, 1e2, 1e4]))
def test_far_from_zero_float32_keeps_three_digits(name, seed, far):
    # E[x²] − E[x]², in one pass over the image, would keep none.
    rng = np.random.default_rng(seed)
    x, w, b = (random_array(rng, shape, "float32") for shape in [(2, 4, 4, 8), (8,), (8,)])
    norm = {"group_norm": partial(group_norm, groups=2), "layer_norm": layer_norm}[name]
    x += np.float32(far)
    exact, _ = norm(*(a.astype("float64") for a in (x, w, b)), eps=1e-5)
    assert_near(norm(x, w, b, eps=1e-5)[0], exact, tol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [0, 1, -3, 0.25, 1e4])
def test_group_norm_of_a_constant_is_the_shift(value, dtype):
    x = np.full((2, 4, 4, 6), value, dtype)
    w, b = (random_array(np.random.default_rng(i), (6,), dtype) for i in (0, 1))
    y, backward = group_norm(x, w, b, groups=3, eps=1e-5)
    assert np.array_equal(y, np.broadcast_to(b, y.shape))
    dx, dw, db = backward(np.ones_like(y))
    assert np.isfinite(dx).all()
    assert not dw.any()
    assert_near(db, np.full(6, 32.0))


@given(seed=seeds, shift=st.floats(-100, 100), scale=st.floats(0.1, 10))
def test_layer_norm_is_a_group_norm_of_single_places(seed, shift, scale):
    rng = np.random.default_rng(seed)
    x, w, b = (random_array(rng, shape) for shape in [(4, 9), (9,), (9,)])
    x = scale * x + shift
    assert_near(layer_norm(x, w, b, 1e-5)[0], group_norm(x, w, b, 1, 1e-5)[0], tol=1e-11)


# -------------------------------------------------------------------------------- shape and joining


@given(seeds, st.floats(0.1, 10))
def test_unit_norm_keeps_the_direction_alone(seed, scale):
    x = random_array(np.random.default_rng(seed), (3, 4))
    y, _ = unit_norm(x, eps=0)
    assert_near((y * y).sum(axis=1), np.ones(3), tol=1e-14)
    assert_near(unit_norm(scale * x, eps=0)[0], y, tol=1e-14)


def test_unit_norm_adds_eps_to_the_length():
    assert_near(unit_norm(np.array([3.0, 4]), eps=1)[0], [0.5, 4 / 6], tol=1e-14)


def test_unit_norm_of_nothing_is_nothing():
    y, backward = unit_norm(np.array([[0.0, 0], [3, 4]]))
    assert_near(y, [[0, 0], [0.6, 0.8]], tol=1e-9)
    assert_near(backward(np.ones((2, 2)))[0], [0, 0])
