"""The functions: equal to loops over numbers, with right gradients, true to their identities."""

import numpy as np
import pytest
import reference
from gradients import check
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_near
from strategies import (
    EVERYTHING,
    LOSSES,
    Call,
    group_norm_calls,
    in_pieces,
    piece_sizes,
    random_array,
    seeds,
    sizes,
)

from tinyldm.nn import activations
from tinyldm.nn import functional as F
from tinyldm.nn.attention import attention
from tinyldm.nn.conv import conv2d
from tinyldm.nn.norms import group_norm, layer_norm

# ----------------------------------------------------------------------------------- every function


@pytest.mark.parametrize("name", EVERYTHING)
@given(data=st.data(), piece=piece_sizes)
def test_equals_its_loop_reference(name, data, piece):
    call = data.draw(EVERYTHING[name])
    inputs = call.arrays()
    with in_pieces(piece):
        y, _ = call(*inputs)
    assert_near(y, getattr(reference, name)(*inputs, **call.options))


@pytest.mark.parametrize("name", EVERYTHING)
@given(data=st.data(), piece=piece_sizes)
def test_gradients(name, data, piece):
    call = data.draw(EVERYTHING[name])
    with in_pieces(piece):
        check(call, call.arrays(), tol=1e-12)


# One call of each function at the sizes of a small U-Net.
NATURAL = [
    Call(F.linear, {"x": (2, 64, 96), "w": (128, 96), "b": (128,)}, 0),
    Call(F.embedding, {"table": (300, 64)}, 1, {"ids": np.arange(144).reshape(2, 72) ** 2 % 300}),
    Call(activations.silu, {"x": (2, 16, 16, 64)}, 2),
    Call(activations.quick_gelu, {"x": (2, 77, 256)}, 3),
    Call(activations.gelu, {"x": (2, 77, 256)}, 4),
    Call(activations.geglu, {"x": (2, 256, 256)}, 5),
    Call(
        group_norm, {"x": (2, 16, 16, 64), "w": (64,), "b": (64,)}, 6,
        {"groups": 16, "eps": 1e-6},
    ),
    Call(
        group_norm, {"x": (2, 8, 8, 128), "w": (128,), "b": (128,)}, 7,
        {"groups": 32, "eps": 1e-5, "silu": True},
    ),
    Call(layer_norm, {"x": (2, 256, 64), "w": (64,), "b": (64,)}, 8, {"eps": 1e-5}),
    Call(F.upsample_nearest, {"x": (2, 8, 8, 64)}, 9, {"size": (15, 16)}),
    Call(F.concatenate, {"x": (2, 8, 8, 64), "y": (2, 8, 8, 32)}, 10),
    Call(F.mse, {"x": (2, 16, 16, 4), "target": (2, 16, 16, 4)}, 11),
    Call(F.l1, {"x": (2, 16, 16, 4), "target": (2, 16, 16, 4)}, 12),
    Call(F.kl_to_standard_normal, {"mean": (2, 16, 16, 4), "logvar": (2, 16, 16, 4)}, 13),
    Call(conv2d, {"x": (2, 16, 16, 32), "w": (3, 3, 32, 48), "b": (48,)}, 14),
    Call(conv2d, {"x": (2, 16, 16, 32), "w": (3, 3, 32, 48)}, 15, {"stride": 2}),
    Call(conv2d, {"x": (2, 16, 16, 32), "w": (1, 1, 32, 48)}, 16, {"padding": 0}),
    Call(attention, {"q": (2, 64, 64), "k": (2, 77, 64), "v": (2, 77, 64)}, 17, {"heads": 4}),
    Call(
        attention, {"q": (2, 77, 64), "k": (2, 77, 64), "v": (2, 77, 64)}, 18,
        {"heads": 4, "causal": True},
    ),
]  # fmt: skip


@pytest.mark.parametrize("call", NATURAL, ids=lambda call: f"{call.function.__name__}-{call.seed}")
def test_float32_is_near_float64(call):
    results = {}
    for dtype in ("float32", "float64"):
        y, backward = call(*(x.astype(dtype) for x in call.arrays("float32")))
        dy = random_array(np.random.default_rng(0), y.shape, "float32").astype(dtype)
        returned = backward(dy)
        gradients = returned if isinstance(returned, tuple) else (returned,)
        results[dtype] = [y, *(dx for dx in gradients if dx is not None)]
    for low, high in zip(results["float32"], results["float64"], strict=True):
        assert np.linalg.norm(low - high) <= 2e-6 * np.linalg.norm(high)


# ----------------------------------------------------------------------------------- normalisations


def by_group(x, groups):
    """(n, ..., c) → (n, groups, all else)."""
    x = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    return x.swapaxes(1, 2).reshape(x.shape[0], groups, -1)


@given(group_norm_calls(silu=False))
def test_group_norm_has_the_moments_of_its_definition(call):
    x, w, b = call.arrays()
    groups, eps = call.options["groups"], call.options["eps"]
    y, _ = call(x, np.ones_like(w), np.zeros_like(b))
    values, variance = by_group(y, groups), by_group(x, groups).var(axis=2)
    assert_near(values.mean(axis=2), np.zeros(values.shape[:2]))
    assert_near(values.var(axis=2), variance / (variance + eps))


@given(group_norm_calls(silu=False), st.floats(0.1, 10), st.floats(-10, 10))
def test_group_norm_undoes_a_scale_if_eps_has_it_too(call, scale, shift):
    x, w, b = call.arrays()
    groups, eps = call.options["groups"], call.options["eps"]
    moved, _ = group_norm(scale * x + shift, w, b, groups, eps * scale**2)
    assert_near(moved, call(x, w, b)[0], tol=1e-10)


@given(group_norm_calls(silu=False))
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


@given(group_norm_calls(silu=False))
def test_group_norm_with_silu_is_group_norm_then_silu(call):
    x, w, b = call.arrays()
    y, fused_back = group_norm(x, w, b, **call.options | {"silu": True})
    h, norm_back = call(x, w, b)
    expected, silu_back = activations.silu(h)
    dy = random_array(np.random.default_rng(call.seed + 1), y.shape)
    assert_near(y, expected)
    for dz, dz_expected in zip(fused_back(dy), norm_back(silu_back(dy)), strict=True):
        assert_near(dz, dz_expected)


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


@pytest.mark.parametrize("side", [1, 8, 31])
@pytest.mark.parametrize("far", [1e2, 1e4])
def test_group_norm_in_float32_far_from_zero(side, far):
    # The variance as a difference, E[x²] − E[x]², would have no right digit here, and a mean that
    # is rounded would leave three at most. The first position is far from all others.
    x = np.random.default_rng(0).normal(far, 1, (2, side, side, 64)).astype("float32")
    x[:, 0, 0] += 30
    one, zero = np.ones(64, "float32"), np.zeros(64, "float32")
    y, _ = group_norm(x, one, zero, groups=2, eps=1e-5)
    expected, _ = group_norm(*(a.astype("float64") for a in (x, one, zero)), groups=2, eps=1e-5)
    assert np.abs(y - expected).max() < 1e-5


@given(seed=seeds, shift=st.floats(-100, 100), scale=st.floats(0.1, 10))
def test_layer_norm_is_a_group_norm_of_single_places(seed, shift, scale):
    rng = np.random.default_rng(seed)
    x, w, b = (random_array(rng, shape) for shape in [(4, 9), (9,), (9,)])
    x = scale * x + shift
    assert_near(layer_norm(x, w, b, 1e-5)[0], group_norm(x, w, b, 1, 1e-5)[0], tol=1e-11)


# -------------------------------------------------------------------------------- shape and joining


@given(st.tuples(sizes, sizes, sizes, sizes), seeds)
def test_upsampling_is_undone_by_taking_every_second_pixel(shape, seed):
    x = random_array(np.random.default_rng(seed), shape)
    y, backward = F.upsample_nearest(x)
    assert np.array_equal(y[:, ::2, ::2], x)
    assert np.array_equal(y[:, 1::2, 1::2], x)
    assert np.array_equal(backward(y), 4 * x)


@given(sizes, sizes, st.integers(1, 12), st.integers(1, 12))
def test_upsampling_reaches_twice_the_size_or_one_less(h, w, out_h, out_w):
    x = np.zeros((1, h, w, 1))
    if out_h in (2 * h, 2 * h - 1) and out_w in (2 * w, 2 * w - 1):
        assert F.upsample_nearest(x, (out_h, out_w))[0].shape == (1, out_h, out_w, 1)
    else:
        with pytest.raises(ValueError, match=f"{h}×{w} can become .* not {out_h}×{out_w}"):
            F.upsample_nearest(x, (out_h, out_w))


def test_an_embedding_adds_up_the_gradients_of_repeated_ids():
    _, backward = F.embedding(np.zeros((4, 2)), np.array([[1, 1], [3, 1]]))
    dy = np.array([[[1, 2], [10, 20]], [[5, 6], [100, 200]]])
    assert np.array_equal(backward(dy), [[0, 0], [111, 222], [0, 0], [5, 6]])


times = st.lists(st.integers(0, 1000), min_size=1, max_size=4).map(np.array)


@given(times, st.integers(4, 13), st.booleans(), st.integers(0, 1))
def test_time_embedding_equals_its_reference(t, d, flip, freq_shift):
    y = F.time_embedding(t, d, flip, freq_shift)
    assert y.dtype == "float64"
    assert_near(y, reference.time_embedding(t, d, flip, freq_shift))


def test_time_embedding_by_hand():
    t = np.array([0, 3])
    cosine, sine = np.cos([3, 0.03]), np.sin([3, 0.03])
    assert_near(F.time_embedding(t, 4), [[1, 1, 0, 0], [*cosine, *sine]])
    assert_near(F.time_embedding(t, 4, False), [[0, 0, 1, 1], [*sine, *cosine]])
    assert_near(F.time_embedding(t, 5), [[1, 1, 0, 0, 0], [*cosine, *sine, 0]])
    assert_near(F.time_embedding(t, 4, freq_shift=1)[1, 1], np.cos(3e-4))


@pytest.mark.parametrize("d, freq_shift", [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_time_embedding_needs_a_frequency(d, freq_shift):
    with pytest.raises(ValueError, match=rf"d // 2 > freq_shift = {freq_shift}, found d = {d}$"):
        F.time_embedding(np.array([1]), d, freq_shift=freq_shift)


@given(times, st.integers(0, 1000), st.integers(2, 9).map(lambda half: 2 * half))
def test_time_embeddings_know_how_far_apart_they_are(t, later, d):
    # cos a cos b + sin a sin b = cos(a − b): products depend on differences of times alone.
    x, moved = F.time_embedding(t, d), F.time_embedding(t + later, d)
    assert_near(x @ x.T, moved @ moved.T, tol=1e-11)
    assert_near((x * x).sum(axis=1), np.full(len(t), d / 2))


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data(), factor=st.floats(-4, 4))
def test_a_loss_passes_its_own_gradient_on(name, data, factor):
    call = data.draw(LOSSES[name])
    inputs = call.arrays()
    loss, backward = call(*inputs)
    assert loss.shape == ()
    _, same_backward = call(*inputs)
    for dx, dx_scaled in zip(backward(), same_backward(factor), strict=True):
        assert_near(dx_scaled, factor * dx)


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data(), seed=seeds)
def test_a_loss_is_the_mean_over_samples(name, data, seed):
    call = data.draw(LOSSES[name])
    rng = np.random.default_rng(seed)
    parts = [call.arrays(), [random_array(rng, (1, *x.shape[1:])) for x in call.arrays()]]
    whole = [np.concatenate(both) for both in zip(*parts, strict=True)]
    n = len(parts[0][0])
    function = call.function
    expected = (n * function(*parts[0])[0] + function(*parts[1])[0]) / (n + 1)
    assert_near(function(*whole)[0], expected)


def test_l1_has_slope_zero_at_zero():
    dx, dtarget = F.l1(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 2.0, 2.0]))[1]()
    assert np.array_equal(dx, [-0.25, 0, 0.25, 0.25])
    assert np.array_equal(dtarget, [0.25, 0, -0.25, -0.25])


@given(seeds)
def test_kl_is_zero_at_the_standard_normal_alone(seed):
    rng = np.random.default_rng(seed)
    mean, logvar = random_array(rng, (2, 3)), random_array(rng, (2, 3))
    assert F.kl_to_standard_normal(mean, logvar)[0] > 0
    kl, backward = F.kl_to_standard_normal(0 * mean, 0 * logvar)
    assert kl == 0
    assert not np.any(backward())
