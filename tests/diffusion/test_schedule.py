"""The tables of the schedule, their identities at every step, and what a network may predict."""

import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyldm.config import ConfigError
from tinyldm.diffusion.schedule import BETAS, PREDICTIONS, Schedule, posterior

TIGHT = 1e-13
# Kind and ends of β; ᾱ at the steps 0, 1, 500, 999 and the ends of σ, to the digits given.
KNOWN = {
    "Stable Diffusion": (
        ("scaled_linear", 0.00085, 0.012),
        "0.99915 0.99829603 0.27633268 4.660e-3 0.02917 14.6146",
    ),
    "latent diffusion": (
        ("scaled_linear", 0.0015, 0.0195),
        "0.9985 0.99699443 0.11492200 1.423e-4 0.03876 83.8225",
    ),
    "latent diffusion, churches and super-resolution": (
        ("scaled_linear", 0.0015, 0.0155),
        "0.9985 0.99699560 0.15007005 6.687e-4 0.03876 38.6590",
    ),
    "latent diffusion, inpainting and layouts": (
        ("scaled_linear", 0.0015, 0.0205),
        "0.9985 0.99699415 0.10767675 9.691e-5 0.03876 101.576",
    ),
    "DDPM": (
        ("linear", 0.0001, 0.02),
        "0.9999 0.99978009 0.07779666 4.036e-5 0.01000 157.407",
    ),
    "cosine": (
        ("squaredcos_cap_v2", 0.0001, 0.02),
        "0.99995872 0.99991258 0.49228517 2.429e-9 0.00643 20291",
    ),
    "the ends of Stable Diffusion, but linear in β": (
        ("linear", 0.00085, 0.012),
        "0.99915 0.99828957 0.16077160 1.579e-3 0.02917 25.146",
    ),
}


def known(name, **others):
    kind, start, end = KNOWN[name][0]
    return Schedule({"beta_schedule": kind, "beta_start": start, "beta_end": end} | others)


@st.composite
def configs(draw):
    """Any length, kind and ends, as long as ᾱ neither underflows nor rounds to where it was."""
    steps = draw(st.integers(1, 1500))
    end = draw(st.floats(1e-5, min(0.999, 100 / steps)))
    return {
        "num_train_timesteps": steps,
        "beta_schedule": draw(st.sampled_from(sorted(BETAS))),
        "beta_start": draw(st.floats(1e-5, end)),
        "beta_end": end,
    }


def drawn_and_known(test):
    """Run a test of a schedule with drawn ones, and always with those whose numbers are known."""
    for name in KNOWN:
        test = example(schedule=known(name))(test)
    return given(schedule=configs().map(Schedule))(test)


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", KNOWN)
def test_known_numbers(name):
    schedule = known(name)
    numbers = [*schedule.alphas_bar[[0, 1, 500, 999]], schedule.sigmas.min(), schedule.sigmas.max()]
    for number, text in zip(numbers, KNOWN[name][1].split(), strict=True):
        last_digit = 10.0 ** Decimal(text).as_tuple().exponent
        assert abs(number - float(text)) <= 0.501 * last_digit


def test_the_defaults_are_those_of_ddpm():
    schedule = Schedule({})
    assert len(schedule) == 1000 and schedule.prediction == "epsilon"
    np.testing.assert_array_equal(schedule.alphas_bar, known("DDPM").alphas_bar)


def test_the_cosine_schedule_has_no_ends_and_a_cap():
    other = Schedule({"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.1, "beta_end": 0.2})
    np.testing.assert_array_equal(known("cosine").betas, other.betas)
    assert other.betas[-1] == other.betas.max() == 0.999


@drawn_and_known
def test_tables_hold_probabilities_that_fall(schedule):
    betas, alphas_bar = schedule.betas, schedule.alphas_bar
    assert betas.shape == alphas_bar.shape == (len(schedule),)
    assert betas.dtype == alphas_bar.dtype == np.float64
    assert (betas > 0).all() and (betas < 1).all()
    assert (np.diff(alphas_bar) < 0).all() and 0 < alphas_bar[-1] and alphas_bar[0] < 1
    products = [math.prod(1 - betas[: t + 1]) for t in range(0, len(schedule), 50)]
    np.testing.assert_allclose(alphas_bar[::50], products, rtol=TIGHT)


@drawn_and_known
def test_signal_and_noise_are_two_sides_of_a_right_angle(schedule):
    t = np.arange(len(schedule))
    a, s = schedule.signal_and_noise(t, like=np.zeros((1, 1)))
    np.testing.assert_allclose(a**2 + s**2, 1, atol=TIGHT, rtol=0)
    np.testing.assert_allclose(schedule.snr(t), (a / s)[:, 0] ** 2, rtol=1e-10)
    np.testing.assert_allclose(schedule.sigmas, (s / a)[:, 0], rtol=1e-10)
    assert (np.diff(schedule.snr(t)) < 0).all() and (np.diff(schedule.sigmas) > 0).all()


def test_tables_stay_float64_and_images_float32():
    schedule = known("Stable Diffusion")
    t = np.array([0, 500, 999])
    x0, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6))
    low = schedule.add_noise(x0.astype("float32"), noise.astype("float32"), t)
    assert low.dtype == np.float32 and schedule.snr(t).dtype == np.float64
    np.testing.assert_allclose(low, schedule.add_noise(x0, noise, t), atol=1e-6)


# ---------------------------------------------------------------------------------------- posterior


def check_posterior(now, then):
    """The normal q(x_s | x_t, x_0), from what follows for any pair of steps s before t."""
    x0_weight, xt_weight, variance = posterior(now, then)
    # Where x_t has no noise, x_s has none: the weights lead from √ᾱ_t x_0 to √ᾱ_s x_0.
    assert math.isclose(x0_weight + xt_weight * math.sqrt(now), math.sqrt(then), rel_tol=TIGHT)
    # The noise of x_t that is kept and the noise that is added make the noise of x_s.
    assert math.isclose(xt_weight**2 * (1 - now) + variance, 1 - then, rel_tol=TIGHT)
    if then < 1:  # Bayes: precisions add, that of the step from s to t and that of x_s
        step = (then - now) / then
        assert math.isclose(1 / variance, now / then / step + 1 / (1 - then), rel_tol=TIGHT)


@drawn_and_known
def test_posterior_of_neighbours(schedule):
    alphas_bar = [1.0, *schedule.alphas_bar.tolist()]
    for now, then, beta in zip(alphas_bar[1:], alphas_bar, schedule.betas, strict=False):
        check_posterior(now, then)
        x0_weight, _, variance = posterior(now, then)
        assert variance <= beta * (1 + TIGHT)
        assert math.isclose(x0_weight, math.sqrt(then) * beta / (1 - now), rel_tol=1e-9)
    assert posterior(alphas_bar[1], 1.0) == (1, 0, 0)


@drawn_and_known
def test_posterior_of_steps_far_apart(schedule):
    alphas_bar = [1.0, *schedule.alphas_bar.tolist()]
    pairs = np.random.default_rng(0).integers(0, len(alphas_bar), (200, 2))
    for then, now in np.sort(pairs):
        if then < now:
            check_posterior(alphas_bar[now], alphas_bar[then])


# ---------------------------------------------------------------------- noising and what to predict


@drawn_and_known
def test_noise_added_at_once_is_noise_added_step_by_step(schedule):
    """x_t is linear in x_0 and ε: mean and variance of q(x_t | x_0) follow without sampling."""
    t = np.arange(len(schedule))
    one, zero = np.ones((len(t), 1)), np.zeros((len(t), 1))
    signal, spread, mean, variance = [], [], 1.0, 0.0
    for beta in schedule.betas:
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        signal.append([mean])
        spread.append([math.sqrt(variance)])
    np.testing.assert_allclose(schedule.add_noise(one, zero, t), signal, rtol=1e-12)
    np.testing.assert_allclose(schedule.add_noise(zero, one, t), spread, rtol=1e-10)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 3, 4)])
def test_every_sample_of_a_batch_has_its_own_step(shape):
    schedule = known("DDPM")
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, *shape))
    t = rng.integers(0, 1000, 7)
    expected = [
        math.sqrt(schedule.alphas_bar[k]) * x0[i] + math.sqrt(1 - schedule.alphas_bar[k]) * noise[i]
        for i, k in enumerate(t)
    ]
    np.testing.assert_allclose(schedule.add_noise(x0, noise, t), expected, rtol=TIGHT)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["Stable Diffusion", "DDPM", "cosine"])
def test_a_right_prediction_gives_back_image_and_noise_at_every_step(prediction, name):
    schedule = known(name, prediction_type=prediction)
    t = np.arange(len(schedule))
    x0, noise = np.random.default_rng(0).uniform(-10, 10, (2, len(t), 5))
    x, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    for k, alpha_bar in enumerate(schedule.alphas_bar):
        found_x0, found_noise = schedule.split(target[k], x[k], alpha_bar)
        # Rounding of x_t, over the signal where x_0 is solved for, or over the noise where ε is.
        x0_tol = TIGHT / (math.sqrt(alpha_bar) if prediction == "epsilon" else 1)
        noise_tol = TIGHT / (math.sqrt(1 - alpha_bar) if prediction == "sample" else 1)
        assert abs(found_x0 - x0[k]).max() <= x0_tol
        assert abs(found_noise - noise[k]).max() <= noise_tol


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(data=st.data())
def test_any_prediction_stands_for_an_image_and_a_noise_that_make_x(prediction, data):
    schedule = known("DDPM", prediction_type=prediction)
    value, x = data.draw(st.floats(-10, 10)), data.draw(st.floats(-10, 10))
    t = data.draw(st.integers(0, 999))
    x0, noise = schedule.split(value, x, schedule.alphas_bar[t])
    x0, noise = np.array([[x0]]), np.array([[noise]])
    size = 1 + abs(x0[0, 0]) + abs(noise[0, 0])
    assert abs(schedule.add_noise(x0, noise, [t])[0, 0] - x) <= TIGHT * size
    assert abs(schedule.target(x0, noise, [t])[0, 0] - value) <= TIGHT * size


def test_velocity_is_the_derivative_along_the_circle():
    """v is by how much x turns with the angle whose cosine is the signal (by complex step)."""
    schedule = known("DDPM", prediction_type="v_prediction")
    x0, noise = np.array([[0.3]]), np.array([[-1.2]])
    for t in (0, 500, 999):
        angle = math.acos(math.sqrt(schedule.alphas_bar[t])) + 1e-20j
        x = np.cos(angle) * x0 + np.sin(angle) * noise
        np.testing.assert_allclose(schedule.target(x0, noise, [t]), x.imag / 1e-20, rtol=1e-10)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"beta_schedule": "sqrt"},
            "beta_schedule = 'sqrt' is not implemented, "
            "only linear, scaled_linear, squaredcos_cap_v2",
        ),
        (
            {"prediction_type": "eps"},
            "prediction_type = 'eps' is not implemented, only epsilon, sample, v_prediction",
        ),
        (
            {"timestep_spacing": "even"},
            "timestep_spacing = 'even' is not implemented, only leading, trailing, linspace",
        ),
        (
            {"some_future_key": 7},
            "unknown key 'some_future_key'",
        ),
        ({"beta_strat": 0.1}, "unknown key 'beta_strat'; did you mean 'beta_start'?"),
        (
            {"beta_schedule": "a" * 10**5},
            f"= '{'a' * 59}… is not implemented, only linear, scaled_linear, squaredcos_cap_v2",
        ),
        ({"beta_end": 10**5000}, "beta_end: expected a number, found a long int"),
        ({"trained_betas": [0.1]}, "trained_betas is not implemented"),
        (
            {"rescale_betas_zero_snr": True},
            "from where a prediction of ε does not lead back; take v_prediction",
        ),
        (
            {"num_train_timesteps": 0},
            "num_train_timesteps: expected an integer of 1 to 100,000, found 0",
        ),
        ({"beta_start": 0.0}, "found 1000, 0.0, 0.02"),
        ({"beta_start": -0.1}, "found 1000, -0.1, 0.02"),
        ({"beta_start": 0.03}, "found 1000, 0.03, 0.02"),
        ({"beta_end": 1.0}, "found 1000, 0.0001, 1.0"),
        ({"beta_end": math.nan}, "beta_end: expected a number, found nan"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(config, message):
    with pytest.raises(ConfigError) as error:
        Schedule(config)
    text = str(error.value)
    assert text.startswith("scheduler config: ") and text.endswith(message) and "\n" not in text


def test_other_keys_are_kept():
    config = {"_class_name": "DDIMScheduler", "trained_betas": None, "steps_offset": 1}
    assert Schedule(config).config == config


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_without_signal_at_the_end(prediction):
    """Stable Diffusion's schedule, whose last step still shows 7 % of the image."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    usual = Schedule(config)
    rescaled = Schedule(config | {"rescale_betas_zero_snr": True, "prediction_type": prediction})
    assert rescaled.alphas_bar[-1] == 0 and rescaled.betas[-1] == 1
    np.testing.assert_allclose(rescaled.alphas_bar[0], usual.alphas_bar[0], rtol=1e-12)
    roots = [np.sqrt(schedule.alphas_bar) for schedule in (usual, rescaled)]
    slope = np.diff(roots[1]) / np.diff(roots[0])
    np.testing.assert_allclose(slope, slope[0], rtol=1e-9)  # shifted and scaled
    assert np.isfinite(rescaled.sigmas).all() and rescaled.sigmas[-1] == math.sqrt(2**24 - 1)
    x = np.ones((1, 2, 2, 1))
    x0, noise = rescaled.split(0.5 * x, x, rescaled.alphas_bar[-1])
    np.testing.assert_array_equal(noise, x)
    np.testing.assert_array_equal(x0, {"v_prediction": -0.5 * x, "sample": 0.5 * x}[prediction])
