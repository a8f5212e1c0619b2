"""The checks of samplers and schedules: on this package's own, and on faulty ones."""

import numpy as np
import pytest

from tinyldm.diffusion import SAMPLERS, Schedule
from tinyldm.testing import SamplerError, check_sampler, check_schedule

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Of samplers without noise. The last step, to no noise at all, is of first order for all.
ORDERS = {"ddim": 1, "euler": 1, "heun": 1, "dpm++2m": 1}


def ours(name, **config):
    schedule = Schedule(STABLE_DIFFUSION | {"clip_sample": False} | config)

    def sample(predict, x, steps):
        rng = np.random.default_rng(0)
        options = {"noise": lambda: rng.normal(size=x.shape)} if SAMPLERS[name].needs_noise else {}
        *_, (end, _) = SAMPLERS[name](predict, schedule, x, steps, **options)
        return end

    return sample, schedule.alphas_bar


@pytest.mark.parametrize("name", ORDERS)
def test_samplers_without_noise(name):
    check_sampler(*ours(name), order=ORDERS[name])


def test_what_a_sampler_clips_is_wrong_for_data_that_go_further():
    with pytest.raises(SamplerError, match="the error falls with steps"):
        check_sampler(*ours("ddim", clip_sample=True))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name].needs_noise])
def test_samplers_that_draw_noise(name):
    assert check_sampler(*ours(name), order=None) <= 0.05


def ddim(predict, x, steps, alpha_bar, slip=0.0, coefficient=None):
    """DDIM, written out; slip: the prediction is that of so many time steps before."""
    times = np.linspace(len(alpha_bar) - 1, 0, steps).round().astype(int)
    for i, t in enumerate(times):
        now, then = alpha_bar[t], alpha_bar[times[i + 1]] if i + 1 < steps else 1.0
        noise = predict(x, max(0.0, t - slip))
        x0 = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
        direction = np.sqrt(1 - then) if coefficient is None else coefficient(then)
        x = np.sqrt(then) * x0 + direction * noise
    return x


ALPHA_BAR = Schedule(STABLE_DIFFUSION).alphas_bar


def test_a_ddim_written_by_hand():
    assert check_sampler(lambda *args: ddim(*args, ALPHA_BAR), ALPHA_BAR) == pytest.approx(
        1, abs=0.1
    )


@pytest.mark.parametrize(
    "options, says",
    [
        ({"slip": 30}, "data that are one point|the error falls"),
        ({"coefficient": lambda then: 1 - then}, "the error falls with"),
        ({"coefficient": lambda then: 0.0}, "the error falls with"),
    ],
)
def test_faulty_ones(options, says):
    with pytest.raises(SamplerError, match=says):
        check_sampler(lambda *args: ddim(*args, ALPHA_BAR, **options), ALPHA_BAR)


def test_schedules():
    for config in ({}, STABLE_DIFFUSION, {"beta_schedule": "squaredcos_cap_v2"}):
        check_schedule(Schedule(config).alphas_bar)
    for alpha_bar, says in (
        (ALPHA_BAR[::-1], "at time step 1, .* is not smaller than the one before"),
        (ALPHA_BAR * 1.1, "at time step 0, .* lies outside of 0…1"),
        (ALPHA_BAR[:300], "at the last time step is"),
        (ALPHA_BAR[400:], "at the first time step is .* too much noise"),
        (np.where(np.arange(1000) == 7, np.nan, ALPHA_BAR), "at time step 7, nan, is no finite"),
        (ALPHA_BAR[None], "expected ᾱ .steps,., found"),
    ):
        with pytest.raises(SamplerError, match=says):
            check_schedule(alpha_bar)
