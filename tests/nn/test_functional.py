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
    FUNCTIONS,
    LOSSES,
    NATURAL,
    method_for,
    random_array,
    seeds,
    sizes,
)

from tinyldm.nn import functional as F

# ----------------------------------------------------------------------------------- every function


@pytest.mark.parametrize("name", EVERYTHING)
@given(data=st.data())
def test_equals_its_loop_reference(name, data):
    call = data.draw(EVERYTHING[name])
    inputs = call.arrays()
    y, _ = call(*inputs)
    assert_near(y, getattr(reference, name)(*inputs, **call.options))


@pytest.mark.parametrize("name", EVERYTHING)
@given(data=st.data())
def test_gradients(name, data):
    call = data.draw(EVERYTHING[name])
    check(call, call.arrays(), tol=1e-12, method=method_for(name))


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


@given(st.tuples(sizes, sizes, sizes, sizes), seeds)
def test_upsampling_is_undone_by_taking_every_second_pixel(shape, seed):
    x = random_array(np.random.default_rng(seed), shape)
    y, backward = F.upsample_nearest(x)
    assert np.array_equal(y[:, ::2, ::2], x)
    assert np.array_equal(y[:, 1::2, 1::2], x)
    assert np.array_equal(backward(y), 4 * x)


@given(FUNCTIONS["upsample_nearest"])
def test_the_gradient_of_upsampling_adds_up_the_copies_of_a_pixel(call):
    (x,) = call.arrays()
    y, backward = call(x)
    dy = random_array(np.random.default_rng(call.seed + 1), y.shape)
    missing = [
        (0, full - size)
        for size, full in zip(y.shape[1:3], (2 * x.shape[1], 2 * x.shape[2]), strict=True)
    ]
    whole = np.pad(dy, [(0, 0), *missing, (0, 0)])
    copies = [whole[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    assert_near(backward(dy), sum(copies))
    # The mean of the copies of a pixel is the pixel.
    assert_near(call(x)[1](y) / call(x)[1](np.ones_like(y)), x)


@given(sizes, sizes, st.integers(1, 12), st.integers(1, 12))
def test_upsampling_reaches_twice_the_size_or_one_less(h, w, out_h, out_w):
    x = np.zeros((1, h, w, 1))
    if out_h in (2 * h, 2 * h - 1) and out_w in (2 * w, 2 * w - 1):
        assert F.upsample_nearest(x, (out_h, out_w))[0].shape == (1, out_h, out_w, 1)
    else:
        with pytest.raises(ValueError, match=f"{h}×{w} can become .* not {out_h}×{out_w}"):
            F.upsample_nearest(x, (out_h, out_w))


def test_an_embedding_adds_up_the_gradients_of_repeated_ids():
    _, backward = F.embedding(np.array([[1, 1], [3, 1]]), np.zeros((4, 2)))
    dy = np.array([[[1, 2], [10, 20]], [[5, 6], [100, 200]]])
    dids, dtable = backward(dy)
    assert dids is None and np.array_equal(dtable, [[0, 0], [111, 222], [0, 0], [5, 6]])


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
    assert_near(x[:, : d // 2] ** 2 + x[:, d // 2 :] ** 2, np.ones((len(t), d // 2)))


@pytest.mark.parametrize("dtype", ["int32", "float32", "float64"])
@given(times, st.integers(2, 9))
def test_times_of_any_type_have_the_same_embedding(dtype, t, d):
    y = F.time_embedding(t.astype(dtype), d)
    assert y.dtype == "float64" and np.array_equal(y, F.time_embedding(t, d))


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data(), factor=st.floats(-4, 4))
def test_a_loss_passes_its_own_gradient_on(name, data, factor):
    call = data.draw(LOSSES[name])
    inputs = call.arrays()
    loss, backward = call(*inputs)
    assert loss.shape == ()
    _, same_backward = call(*inputs)
    gradients, scaled = backward(), same_backward(factor)
    if not isinstance(gradients, tuple):
        gradients, scaled = (gradients,), (scaled,)
    for dx, dx_scaled in zip(gradients, scaled, strict=True):
        assert_near(dx_scaled, factor * dx)


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data(), seed=seeds)
def test_a_loss_is_the_mean_over_samples(name, data, seed):
    call = data.draw(LOSSES[name])
    rng = np.random.default_rng(seed)
    first = dict(zip(call.shapes, call.arrays(), strict=True)) | call.options
    second, whole = dict(first), dict(first)
    for name in call.batched:
        if name in first:
            x = first[name]
            second[name] = x[:1] if name in call.options else random_array(rng, (1, *x.shape[1:]))
            whole[name] = np.concatenate([x, second[name]])
    n = len(first[next(iter(call.shapes))])
    expected = (n * call.function(**first)[0] + call.function(**second)[0]) / (n + 1)
    assert_near(call.function(**whole)[0], expected)


def test_hinge_asks_for_no_more_than_a_distance_of_one():
    real, fake = np.array([[2.0], [1.0], [0.0]]), np.array([[-3.0], [-1.0], [0.0]])
    loss, backward = F.hinge(real, fake)
    assert loss == 0.5 * (1 / 3 + 1 / 3)
    dreal, dfake = backward()
    assert np.array_equal(dreal, [[0], [0], [-0.5 / 3]])
    assert np.array_equal(dfake, [[0], [0], [0.5 / 3]])


@given(seeds)
def test_kl_is_zero_at_the_standard_normal_alone(seed):
    rng = np.random.default_rng(seed)
    mean, logvar = random_array(rng, (2, 3)), random_array(rng, (2, 3))
    assert F.kl_to_standard_normal(mean, logvar)[0] > 0
    kl, backward = F.kl_to_standard_normal(0 * mean, 0 * logvar)
    assert kl == 0
    assert not np.any(backward())


def test_cross_entropy_of_equal_and_of_enormous_logits():
    labels = np.array([0, 3, 1])
    loss, backward = F.cross_entropy(np.full((3, 4), 7.0), labels)
    assert_near(loss, np.log(4))
    assert_near(backward(), (0.25 - np.eye(4)[labels]) / 3)
    sure = 1e4 * np.eye(4, dtype="float32")[labels]
    assert F.cross_entropy(sure, labels)[0] == 0
    assert_near(F.cross_entropy(-sure, labels)[0], 1e4 + np.log(3), tol=1e-7)


@pytest.mark.parametrize("label", [-1, 4])
def test_cross_entropy_of_a_class_that_is_not_there(label):
    with pytest.raises(ValueError, match=f"^cross_entropy: expected labels 0…3, found .*{label}"):
        F.cross_entropy(np.zeros((2, 4)), np.array([2, label]))
