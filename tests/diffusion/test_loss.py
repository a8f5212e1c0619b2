"""The training loss: its formula, how the predictions are related, and its gradient."""

from functools import cache, partial

import numpy as np
import pytest
from gradients import check
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.diffusion.loss import (
    WEIGHTINGS,
    diffusion_loss,
    min_snr,
    noise_floor,
    variational,
)
from tinyldm.diffusion.schedule import PREDICTIONS, Schedule
from tinyldm.nn import functional as F
from tinyldm.nn.protocol import add_grad

every_weighting = pytest.mark.parametrize("name", WEIGHTINGS)


def schedule_for(prediction):
    return Schedule({"beta_schedule": "scaled_linear", "prediction_type": prediction})


def batch(seed=0, n=5):
    rng = np.random.default_rng(seed)
    x0, noise, prediction = rng.normal(0.3, 1, (3, n, 2, 3, 4))
    return x0, noise, prediction, rng.integers(0, 1000, n)


def loss_of(prediction, schedule, x0, noise, t, weighting=None):
    return diffusion_loss(lambda x, t: (prediction, None), schedule, x0, noise, t, weighting)[0]


def bound_weight(schedule, t):
    """What the bound's step costs for an error of 1 in the prediction, from the step itself.

    Ho et al. 2020, eq. 8 and 12: the distance of the means of the reverse step, over 2 β.
    """
    now, before = schedule.alphas_bar[t], schedule.alphas_bar[t - 1] if t else 1.0
    a, s = now**0.5, (1 - now) ** 0.5
    in_x0 = {"epsilon": s / a, "sample": 1, "v_prediction": s}[schedule.prediction]
    mean = before**0.5 * schedule.betas[t] / (1 - now) * in_x0
    return mean**2 / (2 * schedule.betas[t])


@cache
def _bound_weight_mean(prediction):
    schedule = schedule_for(prediction)
    return np.mean([bound_weight(schedule, t) for t in range(1000)])


def bound_weight_mean(schedule):
    return _bound_weight_mean(schedule.prediction)


@every_weighting
@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5))
def test_equals_the_formula(prediction, name, seed, n):
    schedule = schedule_for(prediction)
    x0, noise, values, t = batch(seed, n)
    terms = []
    for i in range(n):
        alpha_bar = schedule.alphas_bar[t[i]]
        a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        target = {"epsilon": noise[i], "sample": x0[i], "v_prediction": a * noise[i] - s * x0[i]}
        snr = alpha_bar / (1 - alpha_bar)
        per_x0 = {"epsilon": 1 / snr, "sample": 1, "v_prediction": 1 / (snr + 1)}
        weight = {
            "simple": 1,
            "min-snr": min(snr, 5) * per_x0[prediction],  # it is 5 at about step 250
            "variational": bound_weight(schedule, t[i]) / bound_weight_mean(schedule),
        }[name]
        terms.append(weight * ((values[i] - target[prediction]) ** 2).mean())
    found = loss_of(values, schedule, x0, noise, t, WEIGHTINGS[name])
    np.testing.assert_allclose(found, np.mean(terms), rtol=1e-12)


def test_the_network_sees_the_noisy_image_and_the_step():
    schedule = schedule_for("epsilon")
    x0, noise, values, t = batch()
    seen = []

    def predict(x, t):
        seen.append((x, t))
        return values, None

    diffusion_loss(predict, schedule, x0, noise, t)
    [(x, steps)] = seen
    np.testing.assert_array_equal(x, schedule.add_noise(x0, noise, t))
    np.testing.assert_array_equal(steps, t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_right_prediction_costs_nothing(prediction):
    schedule = schedule_for(prediction)
    x0, noise, _, t = batch()
    for weighting in WEIGHTINGS.values():
        assert loss_of(schedule.target(x0, noise, t), schedule, x0, noise, t, weighting) == 0


def losses_of_one_guess(t, seed, weighting=None):
    """The loss {prediction: loss} of the same guess of x_0, put as each prediction."""
    x0, noise, guess, _ = batch(seed)
    t = np.full(len(x0), t)
    losses = {}
    for prediction in PREDICTIONS:
        schedule = schedule_for(prediction)
        a, s = schedule.signal_and_noise(t, x0)
        epsilon = (schedule.add_noise(x0, noise, t) - a * guess) / s
        put = schedule.target(guess, epsilon, t)
        losses[prediction] = loss_of(put, schedule, x0, noise, t, weighting)
    return losses


@given(t=st.integers(0, 999), seed=st.integers(0, 2**32 - 1))
def test_one_guess_costs_snr_in_epsilon_and_snr_plus_one_in_v(t, seed):
    losses, snr = losses_of_one_guess(t, seed), schedule_for("sample").snr(t)
    np.testing.assert_allclose(losses["epsilon"], snr * losses["sample"], rtol=1e-10)
    np.testing.assert_allclose(losses["v_prediction"], (snr + 1) * losses["sample"], rtol=1e-10)


@given(t=st.integers(0, 999), seed=st.integers(0, 2**32 - 1), gamma=st.floats(0.01, 100))
def test_with_min_snr_one_guess_costs_the_same_whatever_is_predicted(t, seed, gamma):
    losses = losses_of_one_guess(t, seed, partial(min_snr, gamma=gamma))
    plain, snr = losses_of_one_guess(t, seed)["sample"], schedule_for("sample").snr(t)
    np.testing.assert_allclose(list(losses.values()), min(snr, gamma) * plain, rtol=1e-10)


def test_variational_weights_are_1_on_average():
    for prediction in PREDICTIONS:
        weights = variational(schedule_for(prediction), np.arange(1000))
        np.testing.assert_allclose(weights.mean(), 1)
        assert (weights > 0).all() and weights.argmax() == 0


# ----------------------------------------------------------------------------------------- gradient


@every_weighting
@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(seed=st.integers(0, 2**32 - 1))
def test_gradient_through_a_network(prediction, name, seed):
    """The network is W x_t + b plus a slope in time, with each sample at a step of its own."""
    schedule = schedule_for(prediction)
    x0, noise, _, t = batch(seed)
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(4, 4)), "b": rng.normal(size=4), "slope": rng.normal(size=4)}

    def f(params):
        def predict(x, t):
            y, linear_back = F.linear(x, params["w"], params["b"])
            time = t.reshape(-1, 1, 1, 1) / 1000

            def backward(dy, grads):
                _, dw, db = linear_back(dy)
                for name, gradient in (("w", dw), ("b", db), ("slope", (dy * time).sum((0, 1, 2)))):
                    add_grad(grads, name, gradient)

            return y + params["slope"] * time, backward

        loss, loss_back = diffusion_loss(predict, schedule, x0, noise, t, WEIGHTINGS[name])

        def backward(dloss, grads):
            found = {}
            loss_back(found)
            for name, dw in found.items():
                add_grad(grads, name, dloss * dw)

        return loss, backward

    check(f, [], params, tol=1e-12)


@every_weighting
def test_float32_stays_float32(name):
    x0, noise, values, t = batch()
    x0, noise, values = (x.astype("float32") for x in (x0, noise, values))
    schedule = schedule_for("v_prediction")
    seen = []

    def predict(x, t):
        return values, lambda dprediction, grads: seen.extend([x, dprediction])

    loss, backward = diffusion_loss(predict, schedule, x0, noise, t, WEIGHTINGS[name])
    backward({})
    assert [x.dtype for x in (loss, *seen)] == [np.float32] * 3


def test_backward_returns_what_the_network_returns():
    x0, noise, values, t = batch()
    schedule, grads = schedule_for("epsilon"), {}
    _, backward = diffusion_loss(
        lambda x, t: (values, lambda dy, grads: (dy, grads)), schedule, x0, noise, t
    )
    dprediction, given_grads = backward(grads)
    assert given_grads is grads
    np.testing.assert_allclose(dprediction, 2 * (values - noise) / values.size, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(
    t=st.integers(0, 999), std=st.lists(st.floats(0.01, 3), min_size=1, max_size=4),
)  # fmt: skip
def test_the_floor_is_the_variance_that_x_t_leaves(prediction, t, std):
    """Compare with the variance that x leaves of y, both normal: Var(y) − Cov(y, x)² / Var(x)."""
    schedule = schedule_for(prediction)
    a2, variance = schedule.alphas_bar[t], np.square(std)
    s2 = 1 - a2
    of_x = a2 * variance + s2  # x = a x0 + s ε
    own, with_x = {
        "epsilon": (1.0, np.sqrt(s2)),
        "sample": (variance, np.sqrt(a2) * variance),
        "v_prediction": (a2 + s2 * variance, np.sqrt(a2 * s2) * (1 - variance)),
    }[prediction]
    expected = np.mean(own - with_x**2 / of_x)
    floors = noise_floor(schedule, np.array([std, std]), np.array([t]))
    np.testing.assert_allclose(floors, [[expected, expected]], rtol=1e-6, atol=1e-9)
