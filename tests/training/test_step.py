"""A step of training: its gradient, in one part or several, and what the optimizers are given."""

import copy
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_problem import assert_same, loss_fn, problem, whole_batch

from tinyldm.kernels import plain
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.nn.optim import MAX_NORM, adam_state, adamw, clip_factor, global_norm, muon
from tinyldm.training.presets import PRESETS
from tinyldm.training.state import State
from tinyldm.training.step import NotFinite, accumulated, gradients, train_step, value_and_grad


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9))
def test_the_kernel_gives_the_gradient_of_the_plain_function(seed, n):
    params, batch = problem(seed, n)
    with plain():
        expected = value_and_grad(loss_fn, params, batch)
    assert_same(expected, whole_batch(params, batch))
    assert_same(value_and_grad(loss_fn, params, batch), expected)


def test_a_batch_of_one_array():
    params, (x, target, rows) = problem(0, 5)

    def of_x(params, x):
        return loss_fn(params, x, target, rows)

    with plain():  # which does not cut the batch
        assert_same(value_and_grad(of_x, params, (x,)), whole_batch(params, (x, target, rows)))


def test_arrays_of_unequal_lengths_are_refused():
    params, (x, target, rows) = problem(0, 5)
    with plain(), pytest.raises(ValueError, match=r"one length, at least 1, found \[5, 4, 5\]$"):
        value_and_grad(loss_fn, params, (x, target[:4], rows))


@given(seed=st.integers(0, 99), n=st.integers(1, 9), parts=st.integers(1, 12))
def test_a_batch_in_parts_has_the_same_gradient(seed, n, parts):
    params, batch = problem(seed, n)
    seen, memory = [], {}

    def gradient_of(part):
        """As from other processes: the arrays are overwritten by the next call."""
        seen.append(len(part[0]))
        loss, grads = whole_batch(params, part)
        for name, dw in grads.items():
            memory.setdefault(name, np.empty_like(dw))[...] = dw
        return loss, {name: memory[name] for name in grads}

    found = accumulated(gradient_of, parts)(batch)
    assert_same(found, whole_batch(params, batch))
    assert len(seen) == min(n, parts) and sum(seen) == n and max(seen) - min(seen) <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads do the work")
def test_all_processes_see_what_a_step_changes_in_a_state(with_kernels):
    """The weights of the discriminator as well, which a first stage shares its steps with."""
    state = State(
        PRESETS["tiny"], "autoencoder", {"w": np.ones(2)}, None, "", discriminator={"j": np.ones(2)}
    )
    first = os.getpid()

    def product(params, x):
        def backward(grads):
            grads["w"] = x.mean() * params["j"]
            grads["elsewhere"] = np.array(float(os.getpid() != first))

        return params["w"] @ params["j"] * x.mean(), backward

    with gradients([product], state.params, state.discriminator, 2) as (gradient_of,):
        for _ in range(2):
            state.params.flat[...] += 1
            state.discriminator.flat[...] *= 3
            loss, grads = gradient_of((np.array([1.0, 3.0]),))
            assert loss == 2 * state.params["w"] @ state.discriminator["j"]
            np.testing.assert_array_equal(grads["w"], 2 * state.discriminator["j"])
            assert grads["elsewhere"] == 0.5  # of the batch


# ---------------------------------------------------------------------------------- the whole step

RATE, EMA = 0.003, 0.9


def flat_moments(params):
    zeros = adam_state(params)
    return {moment: Flat(named, first=params.first) for moment, named in zeros.items()}


def state_of(params, muon=0.0, judge=None, step=7):
    """What a step needs of a state: of 10 steps, from the sixth on with a discriminator."""
    params, judge = Flat(params, first=["w"] if muon else []), Flat(judge or {"j": np.ones(2)})
    return SimpleNamespace(
        config=SimpleNamespace(
            denoiser=SimpleNamespace(muon=muon, rate=0.01), adversarial_start=0.51
        ),
        stage="denoiser", step=step, total=10, params=params, average=params.copy(),
        moments=flat_moments(params), discriminator=judge,
        discriminator_moments=flat_moments(judge),
    )  # fmt: skip


def values(state):
    groups = state.params, state.average, *state.moments.values(), state.discriminator
    return [group.flat.copy() for group in (*groups, *state.discriminator_moments.values())]


@pytest.mark.parametrize("size", [0.0, 0.02])
def test_a_step_by_hand(size):
    params, batch = problem(0, 9)
    state, expected = state_of(params, size), state_of(params, size)
    found = train_step(state, lambda batch: whole_batch(state.params, batch), batch, RATE, EMA)
    loss, grads = whole_batch(params, batch)
    norm = global_norm(grads)
    assert found == (loss, pytest.approx(norm)) and norm > MAX_NORM
    scale = clip_factor(norm, MAX_NORM)
    if size:  # its steps grow and shrink with the learning rate
        inner, m = {"w": grads.pop("w")}, expected.moments["m"]
        muon(expected.params, inner, m, expected.average, 7, size * RATE / 0.01, scale, EMA)
    adamw(expected.params, grads, expected.moments, expected.average, 7, RATE, scale, ema=EMA)
    for ours, theirs in zip(values(state), values(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("step, of_its_own", [(5, 0), (6, 0), (9, 3)])
def test_the_discriminator_makes_a_step_of_its_own(step, of_its_own):
    params, batch = problem(0, 9)
    state, expected = state_of(params, step=step), state_of(params, step=step)
    _, grads = whole_batch(params, batch)
    dj = np.array([0.3, -2.0])
    _, norm = train_step(state, lambda _: (0.5, grads | {"j": dj}), batch, RATE, EMA)
    assert norm == pytest.approx(global_norm(grads))  # of the first stage alone
    judge = expected.discriminator
    adamw(judge, {"j": dj}, expected.discriminator_moments, judge, of_its_own, RATE)
    np.testing.assert_allclose(state.discriminator["j"], judge["j"], rtol=1e-12)


@pytest.mark.parametrize("where", ["loss", "w", "j"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_finite_number_changes_nothing(where, wrong):
    params, batch = problem(0, 9)
    state = state_of(params)
    before = copy.deepcopy(values(state))
    loss, grads = whole_batch(params, batch)
    grads["j"] = np.ones(2)
    if where == "loss":
        loss = wrong
    else:
        grads[where].flat[1] = wrong
    with pytest.raises(NotFinite, match="the loss is" if where == "loss" else f"that of {where}"):
        train_step(state, lambda _: (loss, grads), batch, RATE, EMA)
    for now, then in zip(values(state), before, strict=True):
        np.testing.assert_array_equal(now, then)
