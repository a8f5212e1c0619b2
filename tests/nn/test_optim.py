"""AdamW against a loop over numbers, and the identities of clipping, averaging and the rate."""

import contextlib
import inspect
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.config import ConfigError
from tinyldm.kernels import plain
from tinyldm.kernels.cpu import adamw as kernel
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.nn import optim
from tinyldm.nn.optim import (
    BETA1,
    BETA2,
    EPSILON,
    adamw,
    clip_factor,
    ema_decay,
    global_norm,
    learning_rate,
)
from tinyldm.nn.protocol import KERNELS
from tinyldm.training.config import Stage

SHAPES = {"matrix": (3, 4), "kernel": (3, 3, 2, 2), "bias": (5,), "scalar": ()}
seeds = st.integers(0, 2**32 - 1)


def random_tensors(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return Flat({name: rng.normal(0.3, 1, shape) for name, shape in shapes.items()})


@pytest.fixture(autouse=True, params=["kernels", "plain"])
def both(request):
    with plain() if request.param == "plain" else contextlib.nullcontext():
        yield


def adam_state(params):
    """In flat buffers, as the kernel wants them; to the plain function they are dicts."""
    return {moment: Flat(zeros) for moment, zeros in optim.adam_state(params).items()}


def assert_equal(found, expected, rtol=0.0, atol=0.0):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=atol, err_msg=name)


# -------------------------------------------------------------------------------------------- AdamW


def reference_step(w, g, m, v, average, step, lr, scale, decay, ema):
    """One number's step: decay first and on its own, corrected moments, ε outside of the root."""
    g = g * scale
    w = w - lr * decay * w
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    corrected_m = m / (1 - BETA1 ** (step + 1))
    corrected_v = v / (1 - BETA2 ** (step + 1))
    w = w - lr * corrected_m / (math.sqrt(corrected_v) + EPSILON)
    n = step + 1
    keep = min(ema, (1 + n) / (10 + n))
    return w, m, v, keep * average + (1 - keep) * w


@given(
    seed=seeds,
    lr=st.floats(1e-6, 0.1),
    scale=st.floats(1e-4, 1),
    decay=st.floats(0, 1),
    ema=st.floats(0, 1),
    first=st.sampled_from([0, 1, 1000, 10**6, 10**9]),
)
def test_equals_a_loop_over_numbers(seed, lr, scale, decay, ema, first):
    params = random_tensors(seed)
    average, state = random_tensors(seed + 1), adam_state(params)
    numbers = {
        name: [[w, 0.0, 0.0, e] for w, e in zip(params[name].flat, average[name].flat, strict=True)]
        for name in params
    }
    for step in range(first, first + 20):
        grads = random_tensors(seed + step)
        adamw(params, grads, state, average, step, lr, scale, decay, ema)
        for name, rows in numbers.items():
            of_matrix = decay if params[name].ndim > 1 else 0.0
            for i, (w, m, v, e) in enumerate(rows):
                g = grads[name].flat[i]
                rows[i] = reference_step(w, g, m, v, e, step, lr, scale, of_matrix, ema)
    for name, rows in numbers.items():
        found = [x[name].ravel() for x in (params, state["m"], state["v"], average)]
        np.testing.assert_allclose(np.transpose(found), rows, rtol=1e-12, atol=1e-14, err_msg=name)


def test_state_starts_at_zero_like_the_parameters():
    params = Flat({"w": np.ones((2, 3), "float32"), "b": np.ones(3, "float32")})
    state = adam_state(params)
    assert state.keys() == {"m", "v"}
    for moments in state.values():
        assert {name: (m.shape, m.dtype) for name, m in moments.items()} == {
            name: (w.shape, w.dtype) for name, w in params.items()
        }
        assert not any(m.any() for m in moments.values())
    assert state["m"]["w"] is not state["v"]["w"]


def step_from(params, grads, **options):
    """Parameters after a first step, and their average, which started as the parameters."""
    params, average = params.copy(), params.copy()
    adamw(params, grads, adam_state(params), average, 0, **({"lr": 0.01, "decay": 0} | options))
    return params, average


def test_first_step_has_the_length_of_the_rate():
    params, grads = random_tensors(0), random_tensors(1)
    moved, _ = step_from(params, grads)
    expected = {name: w - 0.01 * np.sign(grads[name]) for name, w in params.items()}
    assert_equal(moved, expected, atol=1e-7)


def test_scale_of_the_gradients_does_not_matter():
    params, grads = random_tensors(0), random_tensors(1)
    larger = {name: 1024 * g for name, g in grads.items()}
    assert_equal(step_from(params, larger)[0], step_from(params, grads)[0], atol=1e-7)
    # As a factor it is the same as in the gradients, to the last bit.
    assert_equal(step_from(params, grads, scale=1024)[0], step_from(params, larger)[0])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_gradient_only_matrices_decay(decay):
    params = random_tensors(0)
    zeros = {name: np.zeros_like(w) for name, w in params.items()}
    moved, _ = step_from(params, zeros, decay=decay)
    shrink = {"matrix": 1 - 0.01 * decay, "kernel": 1 - 0.01 * decay, "bias": 1, "scalar": 1}
    assert_equal(moved, {name: shrink[name] * w for name, w in params.items()})


def test_arrays_are_changed_in_place_and_gradients_left_alone():
    params, grads, average = random_tensors(0), random_tensors(1), random_tensors(2)
    state = adam_state(params)
    every = [params, average, state["m"], state["v"]]
    objects = [dict(tensors) for tensors in every]  # the same arrays
    before, grads_before = [tensors.copy() for tensors in every], grads.copy()
    adamw(params, grads, state, average, 0, 0.01, scale=0.5)
    for now, same, old in zip(every, objects, before, strict=True):
        assert now.keys() == same.keys()
        for name in now:
            assert now[name] is same[name] and (now[name] != old[name]).all()
    assert_equal(grads, grads_before)


def test_a_flat_is_a_copy_in_one_buffer_matrices_first():
    named = {"bias": np.arange(3.0), "turned": np.arange(6.0).reshape(2, 3).T, "one": np.float64(7)}
    flat = Flat(named)
    assert_equal(flat, named)
    assert list(flat) == list(named)
    assert flat.decayed == 6
    np.testing.assert_array_equal(flat.flat, [0, 3, 1, 4, 2, 5, 0, 1, 2, 7])
    flat["turned"][0, 1] = 9
    assert flat.flat[1] == 9 and named["turned"][0, 1] == 3
    other = flat.copy()
    other.flat[...] = 0
    assert flat["one"] == 7 and other["one"] == 0 and other.keys() == flat.keys()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_parts_of_a_flat_cover_each_number_once(sizes, data):
    named = Flat({str(i): np.arange(float(size)) + 10 * i for i, size in enumerate(sizes)})
    start = data.draw(st.integers(0, len(named.flat)))
    stop = data.draw(st.integers(start, len(named.flat)))
    found = np.full(stop - start, np.nan)
    for name, inside, here in named.parts(start, stop):
        found[here] = named[name][inside]
    np.testing.assert_array_equal(found, named.flat[start:stop])


@pytest.mark.parametrize("first", [["kernel"], ["kernel", "matrix"], []])
def test_what_has_no_gradient_stays(first):
    """Leave alone the matrices that Muon moves, which lie first in the buffers."""
    params, grads = random_tensors(0), random_tensors(1)
    expected, _ = step_from(params, grads, decay=0.1)
    for name in first:
        del grads[name]
    in_order = Flat(params, first=first)
    moved, average = in_order.copy(), in_order.copy()
    state = {m: Flat(x, first=first) for m, x in optim.adam_state(params).items()}
    adamw(moved, grads, state, average, 0, lr=0.01, decay=0.1)
    assert_equal(moved, {n: params[n] if n in first else w for n, w in expected.items()})
    assert set(moved.order[: len(first)]) == set(first)


def test_large_arrays_in_blocks(monkeypatch):
    shapes = {"large": (2 * kernel.BLOCK + 17,), "table": (300, 301)}
    params, grads = random_tensors(0, shapes), random_tensors(1, shapes)
    results = []
    for piece in (kernel.BLOCK, 1000, 10**9):
        monkeypatch.setattr(kernel, "BLOCK", piece)
        results.append(step_from(params, grads, decay=0.1, scale=0.3))
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert_equal(a, b)


def test_the_cores_share_the_parameters(monkeypatch):
    params, grads = random_tensors(0), random_tensors(1)
    expected = step_from(params, grads)[0]
    for cores in (1, 3, 9):
        monkeypatch.setattr(kernel, "cores", lambda cores=cores: cores)
        assert_equal(step_from(params, grads)[0], expected)


def test_float32_stays_float32_and_near():
    params, grads = random_tensors(0), random_tensors(1)
    low = [Flat({name: np.asarray(x, "float32") for name, x in t.items()}) for t in (params, grads)]
    factor = clip_factor(global_norm(low[1]), 1.0)
    assert factor.dtype == np.float32
    found = step_from(*low, scale=factor)
    expected = step_from(params, grads, scale=clip_factor(global_norm(grads), 1.0))
    for a, b in zip(found, expected, strict=True):
        assert {x.dtype for x in a.values()} == {np.dtype("float32")}
        assert_equal(a, b, 1e-5)


# ------------------------------------------------------------------------------------------ average


def test_average_warms_up():
    assert [ema_decay(step, 0.999) for step in range(3)] == [2 / 11, 3 / 12, 4 / 13]
    assert ema_decay(10**6, 0.999) == 0.999
    assert ema_decay(10**9, 0.9999) == 0.9999
    assert ema_decay(0, 0.1) == 0.1
    decays = [ema_decay(step, 0.99) for step in range(2000)]
    assert decays == sorted(decays) and decays[-1] == 0.99


@given(seed=seeds, ema=st.floats(0, 1), steps=st.integers(1, 30))
def test_average_of_constant_weights_in_closed_form(seed, ema, steps):
    """What is left of the start is the product of the decays; the rest is the weights."""
    params, average = random_tensors(seed), random_tensors(seed + 1)
    start, state = average.copy(), adam_state(params)
    for step in range(steps):
        adamw(params, random_tensors(step), state, average, step, lr=0.0, ema=ema)
    assert_equal(params, random_tensors(seed))
    left = math.prod(min(ema, (1 + n) / (10 + n)) for n in range(1, steps + 1))
    expected = {name: left * start[name] + (1 - left) * w for name, w in params.items()}
    assert_equal(average, expected, 1e-12, 1e-14)


def test_average_of_weights_that_stay_is_not_rounded_away():
    params = random_tensors(0)
    average, state = params.copy(), adam_state(params)
    for step in range(50):
        adamw(params, random_tensors(step), state, average, step, lr=0.0)
    assert_equal(average, params)


def test_average_follows_the_weights_after_their_step():
    params = random_tensors(0)
    moved, average = step_from(params, random_tensors(1))
    expected = {name: w + (1 - 2 / 11) * (moved[name] - w) for name, w in params.items()}
    assert_equal(average, expected, 1e-13)


# -------------------------------------------------------------------------------- clipping and rate


@given(seed=seeds, size=st.floats(1e-6, 1e6))
def test_norm_is_that_of_one_long_vector(seed, size):
    grads = {name: size * g for name, g in random_tensors(seed).items()}
    expected = np.linalg.norm(np.concatenate([g.ravel() for g in grads.values()]))
    norm = global_norm(grads)
    assert norm.shape == ()
    np.testing.assert_allclose(norm, expected, rtol=1e-13)
    turned = {name: g.T for name, g in grads.items()}
    np.testing.assert_allclose(global_norm(turned), expected, rtol=1e-13)


@given(seed=seeds, size=st.floats(1e-6, 1e6), limit=st.floats(1e-3, 1e3))
def test_clipping_bounds_the_norm_and_leaves_short_gradients(seed, size, limit):
    grads = {name: size * g for name, g in random_tensors(seed).items()}
    norm = global_norm(grads)
    factor = clip_factor(norm, limit)
    assert 0 < factor <= 1
    assert norm * factor <= limit * (1 + 1e-12)
    if norm < limit * (1 - 1e-12):
        assert factor == 1
    else:
        np.testing.assert_allclose(norm * factor, limit, rtol=1e-8)


def test_clipping_of_nothing_and_of_what_is_not_finite():
    assert clip_factor(np.float64(0.0), 1.0) == 1
    assert clip_factor(np.float64(np.inf), 1.0) == 0
    assert np.isnan(clip_factor(np.float64(np.nan), 1.0))  # for the training loop to see


def test_rate_warms_up_in_a_line_and_falls_as_half_a_cosine():
    rates = [learning_rate(step, 110, 3.0, 10) for step in range(111)]
    np.testing.assert_allclose(rates[:10], 0.3 * np.arange(1, 11), rtol=1e-14)
    assert rates[10] == max(rates) == 3
    np.testing.assert_allclose(rates[60], 1.5, rtol=1e-14)
    assert rates[110] == 0 and min(rates) == 0
    assert (np.diff(rates[10:]) < 0).all()
    np.testing.assert_allclose(np.add(rates[10:], rates[10:][::-1]), np.full(101, 3.0), rtol=1e-13)


def test_rate_may_fall_in_a_line_or_stay():
    line = [learning_rate(step, 110, 3.0, 10, "linear") for step in range(111)]
    np.testing.assert_allclose(line[10:], np.linspace(3, 0, 101), atol=1e-13)
    stays = [learning_rate(step, 110, 3.0, 10, "constant") for step in range(200)]
    assert set(stays[9:]) == {3.0} and stays[:9] == line[:9]
    with pytest.raises(ConfigError, match="decay: expected cosine, linear or constant"):
        Stage(batch=1, rate=1.0, warmup=0, ema=0.9, decay="cosin")


@given(total=st.integers(1, 10**6), warmup=st.integers(0, 10**4), step=st.integers(0, 2 * 10**6))
def test_rate_is_in_range_and_depends_on_the_step_alone(total, warmup, step):
    rate = learning_rate(step, total, 2.0, warmup)
    assert 0 <= rate <= 2
    assert rate == learning_rate(step, total, 2.0, warmup)
    if step >= max(total, warmup + 1):
        assert rate == 0
    if warmup == 0:
        assert learning_rate(0, total, 2.0, 0) == 2


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_a_run_of_one_step_after_the_warmup_ends_at_0(warmup):
    assert learning_rate(warmup, warmup + 1, 3.0, warmup) == 3
    assert learning_rate(warmup + 1, warmup + 1, 3.0, warmup) == 0


def test_adamw_and_its_kernels_have_the_same_defaults():
    kernels = KERNELS["tinyldm.nn.optim.adamw"]
    functions = [adamw.__wrapped__, *(one.function for one in kernels)]
    assert len(functions) > 1
    for function in functions:
        known = inspect.signature(function).parameters
        assert [known[name].default for name in ("scale", "decay", "ema")] == [1.0, 0.01, 0.999]
