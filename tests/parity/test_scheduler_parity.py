"""Schedules and whole trajectories against diffusers' schedulers, in float64.

The network is a formula, the same for both, that depends on x and on t. Noise is drawn beforehand
and handed to both.
"""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from peers import InFloat64

from tinyldm.diffusion.samplers import SAMPLERS, ddim, ddpm
from tinyldm.diffusion.schedule import PREDICTIONS, Schedule
from tinyldm.diffusion.timesteps import timesteps

STEPS = (1, 2, 5, 20, 50, 100, 250, 500)
UNEVEN = (3, 7, 30, 300, 600, 999)  # do not divide 1000
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
LEADING_1 = {"clip_sample": False, "steps_offset": 1}
TRAILING = {"clip_sample": False, "timestep_spacing": "trailing"}
LINSPACE = {"clip_sample": False, "timestep_spacing": "linspace"}
CONFIGS = {
    "Stable Diffusion": STABLE_DIFFUSION,
    "leading, offset 0": {"clip_sample": False},
    "leading, offset 1": LEADING_1,
    "trailing": TRAILING,
    "linspace": LINSPACE,
    "cosine": TRAILING | {"beta_schedule": "squaredcos_cap_v2"},
    "pixels": {"clip_sample": True, "clip_sample_range": 0.7},
}


def network(x, t):
    return 0.9 * np.sin(0.7 * x + 0.01 * int(t))  # flat enough for rounding not to grow


def both_schedules(kind, config, rtol=1e-14):
    """Theirs, with tables of float64 where it makes them of float32, and ours."""
    config = {key: value for key, value in config.items() if _takes(kind, key)}
    with InFloat64():
        theirs = kind(**config)
    assert theirs.betas.dtype == theirs.alphas_cumprod.dtype == torch.float64
    ours = Schedule(dict(theirs.config))
    np.testing.assert_allclose(ours.betas, theirs.betas, rtol)
    np.testing.assert_allclose(ours.alphas_bar, theirs.alphas_cumprod, rtol=1e-12)
    return theirs, ours


def _takes(kind, key):
    return key != "set_alpha_to_one" or kind is DDIMScheduler


def their_trajectory(scheduler, x, steps, step):
    scheduler.set_timesteps(steps)
    x = torch.tensor(x)
    pairs = []
    for i, t in enumerate(scheduler.timesteps):
        prediction = torch.tensor(network(x.numpy(), t))
        made = step(i, prediction, t, x)
        x = made.prev_sample
        pairs.append((x.numpy(), made.pred_original_sample.numpy()))
    return pairs


def assert_same(ours, theirs):
    ours, theirs = np.array(list(ours)), np.array(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * max(1, abs(theirs).max()))


def start(steps):
    """The start noise, and noise for each step but the last, for which it is zero."""
    x, *noises = np.random.default_rng(steps).normal(size=(steps + 1, 2, 3))
    noises[-1] = 0 * x
    return x, noises


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("total", [1, 10, 1000])
def test_tables(kind, beta_schedule, total):
    theirs, ours = both_schedules(
        kind, {"num_train_timesteps": total, "beta_schedule": beta_schedule}
    )
    assert len(ours) == len(theirs) == total


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of theirs
@pytest.mark.parametrize("name", SAMPLERS)
def test_betas_of_a_config_that_gives_none(name):
    kind = getattr(diffusers, SAMPLERS[name].scheduler)
    ours = Schedule({"_class_name": kind.__name__})
    np.testing.assert_allclose(ours.betas, kind().betas, rtol=1e-6)  # theirs are of float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noising_and_velocity(prediction):
    theirs, ours = both_schedules(DDPMScheduler, {"prediction_type": prediction})
    x0, noise = np.random.default_rng(0).normal(size=(2, 50, 4, 3, 2))
    t = np.arange(0, 1000, 20)
    tensors = [torch.tensor(array) for array in (x0, noise, t)]
    np.testing.assert_allclose(ours.add_noise(x0, noise, t), theirs.add_noise(*tensors), rtol=1e-12)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": theirs.get_velocity(*tensors)}
    np.testing.assert_allclose(
        ours.target(x0, noise, t), expected[prediction], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_timesteps(name):
    theirs, ours = both_schedules(DDIMScheduler, CONFIGS[name])
    for steps in range(1, 1000):  # with 1000, an offset leads theirs past the last trained step
        theirs.set_timesteps(steps)
        expected = theirs.timesteps[:steps].numpy()
        if ours.config["timestep_spacing"] == "trailing":
            # Theirs counts down in floating point: that may bring one more step, t = −1, and one
            # that lies half-way between two may be rounded to either.
            halves, rest = np.divmod(2000 * np.arange(steps), steps)
            either = (rest == 0) & (halves % 2 == 1)
            assert abs(timesteps(ours, steps) - expected).max() <= 1
            expected[either] = timesteps(ours, steps)[either]
        np.testing.assert_array_equal(timesteps(ours, steps), expected)


# ------------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
# Theirs takes t − T // steps for the next step. That is not the next one visited where the spacing
# is "linspace", or where it is "trailing" and the steps do not divide T; see the tests below.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "linspace"])
def test_ddim(name, eta, prediction):
    theirs, ours = both_schedules(DDIMScheduler, CONFIGS[name] | {"prediction_type": prediction})
    leading = ours.config["timestep_spacing"] == "leading"
    for steps in (*STEPS, 30, 300) if leading else STEPS:
        x, noises = start(steps)
        expected = their_trajectory(
            theirs,
            x,
            steps,
            lambda i, prediction, t, x, noises=noises: theirs.step(
                prediction, t, x, eta=eta, variance_noise=torch.tensor(noises[i])
            ),
        )
        assert_same(ddim(network, ours, x, steps, eta, iter(noises).__next__), expected)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_without_signal_at_the_end(prediction):
    config = TRAILING | {"rescale_betas_zero_snr": True, "prediction_type": prediction}
    for beta_schedule in ("linear", "scaled_linear"):
        # β is here 1 less a quotient near 1.
        config["beta_schedule"] = beta_schedule
        theirs, ours = both_schedules(DDIMScheduler, config, rtol=1e-11)
        assert ours.alphas_bar[-1] == 0
        for steps in STEPS:
            x, _ = start(steps)
            expected = their_trajectory(
                theirs, x, steps, lambda i, said, t, x, theirs=theirs: theirs.step(said, t, x)
            )
            assert_same(ddim(network, ours, x, steps), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm(name, prediction, variance, monkeypatch):
    config = CONFIGS[name] | {"prediction_type": prediction, "variance_type": variance}
    theirs, ours = both_schedules(DDPMScheduler, config)
    for steps in (*STEPS, 30, 300):
        # After a last step at t > 0 theirs adds noise of variance 1e-20, ours none; it is 0 here.
        x, noises = start(steps)
        feed = iter(noises)
        monkeypatch.setattr(
            scheduling_ddpm, "randn_tensor", lambda *_, feed=feed, **__: torch.tensor(next(feed))
        )
        expected = their_trajectory(
            theirs, x, steps, lambda i, prediction, t, x: theirs.step(prediction, t, x)
        )
        assert_same(ddpm(network, ours, x, steps, iter(noises).__next__), expected)


# --------------------------------------------------------------- where theirs is not to be followed
#
# There ours is held against the mathematics. With a single point μ as data the trajectory is
# x = √ᾱ μ + √(1 − ᾱ) ε, at the ᾱ of the steps that are visited, with one ε from start to end.


def assert_on_the_line(config, steps):
    schedule = Schedule(config)
    mean, noise = 0.7, np.array([-2.0, 0.3, 1.5])
    last = 1.0 if config.get("set_alpha_to_one", True) else schedule.alphas_bar[0]
    alphas_bar = np.append(schedule.alphas_bar[timesteps(schedule, steps)], last)[:, None]
    line = np.sqrt(alphas_bar) * mean + np.sqrt(1 - alphas_bar) * noise

    def predict(x, t):
        alpha_bar = schedule.alphas_bar[t]
        return (x - math.sqrt(alpha_bar) * mean) / math.sqrt(1 - alpha_bar)

    pairs = np.array(list(ddim(predict, schedule, line[0], steps)))
    np.testing.assert_allclose(pairs[:, 0], line[1:], rtol=0, atol=1e-10)
    np.testing.assert_allclose(pairs[:, 1], np.full((steps, 3), mean), rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", (*STEPS, *UNEVEN))
def test_linspace_steps_lead_to_the_next_one_visited(steps):
    """Theirs steps by T // n, but these lie (T − 1) / (n − 1) apart."""
    assert_on_the_line(LINSPACE, steps)


@pytest.mark.parametrize("steps", UNEVEN)
def test_trailing_steps_lead_to_the_next_one_visited(steps):
    """Theirs steps by T // n, but these lie T / n apart, rounded."""
    assert_on_the_line(TRAILING, steps)


@pytest.mark.parametrize("steps", [501, 600, 999])
def test_many_leading_steps_end_without_noise(steps):
    """From t = 1 theirs goes to t = 0 and ends there, since 1 − T // n is not below 0."""
    assert_on_the_line(LEADING_1, steps)


def test_an_offset_with_every_step():
    """Theirs fails: its first step is t = 1000, past the last trained one. Ours takes 999 again."""
    assert_on_the_line(LEADING_1, 1000)
    assert_on_the_line(STABLE_DIFFUSION, 1000)
