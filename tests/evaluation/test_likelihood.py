"""Bits for each number, on data whose perfect denoiser, and so the bound, is a formula."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_model import PROMPTS, make_pipeline

from tinyldm.data.dataset import Dataset
from tinyldm.diffusion.schedule import PREDICTIONS, Schedule
from tinyldm.evaluation.likelihood import bits_per_dim, bound_terms, prior_term
from tinyldm.evaluation.metrics import likelihood

SCHEDULES = {
    "linear": {"num_train_timesteps": 40, "beta_start": 0.01, "beta_end": 0.3},
    "stable diffusion": {"num_train_timesteps": 60, "beta_schedule": "scaled_linear",
                         "beta_start": 0.005, "beta_end": 0.2},
    "cosine": {"num_train_timesteps": 30, "beta_schedule": "squaredcos_cap_v2"},
}  # fmt: skip
# Three nodes of Gauss and Hermite are exact for what is quadratic in a normal number.
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(3)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
X, NOISE = (grid.ravel()[:, None] for grid in np.meshgrid(NODES, NODES))
W = np.outer(WEIGHTS, WEIGHTS).ravel()


def denoiser(schedule, mean, spread):
    """What a perfect network predicts at x_t for data from N(mean, spread²)."""

    def predict(x, t):
        a, s = schedule.signal_and_noise(t, x)
        surprise = (x - a * mean) / (a**2 * spread**2 + s**2)
        x0, noise = mean + a * spread**2 * surprise, s * surprise
        return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0}[
            schedule.prediction
        ]

    return predict


def bound(schedule, mean, spread):
    """The bound in nats, its expectation over data and noise taken exactly."""
    predict = denoiser(schedule, mean, spread)
    total = W @ prior_term(schedule, mean + spread * X)
    for t in range(len(schedule)):
        at = np.full(len(X), t)
        total += W @ bound_terms(predict, schedule, mean + spread * X, NOISE, at)
    return total


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_of_standard_normal_data_it_is_their_entropy(name, prediction):
    """There the reverse steps are normal with variance β, so that the bound is no bound."""
    schedule = Schedule(SCHEDULES[name] | {"prediction_type": prediction})
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    np.testing.assert_allclose(bound(schedule, 0, 1), entropy, rtol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@given(mean=st.floats(-2, 2), spread=st.floats(0.05, 3))
def test_of_other_normal_data_it_is_the_formula(name, mean, spread):
    """Of the mean squared error of the perfect guess, a² and s² being signal and noise."""
    schedule = Schedule(SCHEDULES[name] | {"prediction_type": "v_prediction"})
    alpha_bar = schedule.alphas_bar
    before = np.append(1.0, alpha_bar[:-1])
    beta, error = schedule.betas, spread**2 * (1 - alpha_bar)
    error = error / (alpha_bar * spread**2 + 1 - alpha_bar)
    ratio = (1 - before) / (1 - alpha_bar)  # of the posterior's variance to β
    distance = before * beta / (1 - alpha_bar) ** 2 * error  # over β
    steps = 0.5 * (ratio[1:] - 1 - np.log(ratio[1:]) + distance[1:]).sum()
    first = 0.5 * (math.log(2 * math.pi * beta[0]) + error[0] / beta[0])
    square = mean**2 + spread**2
    prior = 0.5 * (alpha_bar[-1] * (square - 1) - math.log(1 - alpha_bar[-1]))
    np.testing.assert_allclose(bound(schedule, mean, spread), prior + steps + first, rtol=1e-9)
    entropy = 0.5 * math.log(2 * math.pi * math.e * spread**2)
    assert bound(schedule, mean, spread) >= entropy - 1e-9


@pytest.mark.parametrize("shape", [(20_000, 6), (5000, 4, 4, 2)])
def test_the_estimate_is_the_bound(shape):
    schedule = Schedule(SCHEDULES["linear"])
    rng = np.random.default_rng(0)
    x0 = rng.normal(0, 1, shape).astype(np.float32)
    bits, error = bits_per_dim(denoiser(schedule, 0, 1), schedule, x0, rng, draws=4)
    entropy = -0.5 * (x0.astype(float) ** 2 + math.log(2 * math.pi)).mean() / -math.log(2)
    assert abs(bits - entropy) < 0.02 and 0 < error < 0.1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_standard_error_is_that_of_the_seeds(name, spread):
    schedule = Schedule(SCHEDULES[name])
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x0 = rng.normal(0, spread, (60, 4)).astype(np.float32)
        found.append(bits_per_dim(denoiser(schedule, 0, spread), schedule, x0, rng))
    bits, errors = np.transpose(found)
    assert 0.5 < bits.std(ddof=1) / np.sqrt(np.mean(errors**2)) < 2


def test_a_schedule_of_one_step():
    schedule = Schedule({"num_train_timesteps": 1, "beta_start": 0.9, "beta_end": 0.9})
    rng = np.random.default_rng(0)
    found = bits_per_dim(denoiser(schedule, 0, 1), schedule, np.zeros((4, 3), "f4"), rng)
    assert np.isfinite(found).all()


def test_a_wrong_denoiser_costs_bits():
    schedule = Schedule(SCHEDULES["linear"])
    x0 = np.random.default_rng(0).normal(0, 1, (2000, 3)).astype(np.float32)
    right, wrong = (
        bits_per_dim(denoiser(schedule, *data), schedule, x0, np.random.default_rng(1))[0]
        for data in ((0, 1), (0.5, 1))
    )
    assert wrong > right + 0.05


def test_of_a_model_the_same_number_every_time():
    pipe = make_pipeline()
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    data = Dataset(images, (PROMPTS * 2)[:6], [""] * 6)
    found = likelihood(pipe, data)
    assert np.isfinite(found).all() and found == likelihood(pipe, data)
