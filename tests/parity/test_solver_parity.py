"""Whole trajectories of PNDM and of the solvers in σ against diffusers' schedulers, in float64.

Their tables, which are of float32, are made of float64 here. The network is a formula, the same for
both, that depends on x and on t; noise is drawn beforehand and handed to both.
"""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.schedulers import (
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
)
from peers import InFloat64

from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.schedule import Schedule
from tinyldm.diffusion.timesteps import sigma_steps

# NumPy to diffusers, which makes arrays of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = (1, 2, 5, 20, 50, 999, 1000)
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PEERS = {
    "pndm": (PNDMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "dpm++2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}
CONFIGS = {
    "as it comes": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "Karras": {"use_karras_sigmas": True},
    "down to the least": {"final_sigmas_type": "sigma_min"},
    "Karras, own ends": {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
    "one last step of first order": {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    "second order to the end": {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "without Runge-Kutta": {"skip_prk_steps": True, "steps_offset": 1},
}
MODULES = (
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
)


class NumpyInFloat64:
    """numpy, whose float32 is float64."""

    float32 = np.float64

    def __getattr__(self, name):
        return getattr(np, name)


@pytest.fixture(autouse=True)
def float64_tables(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "np", NumpyInFloat64())


def network(x, t):
    return 0.9 * np.sin(0.7 * x + 0.01 * float(t))  # flat enough for rounding not to grow


def their_trajectory(scheduler, x, steps):
    scheduler.set_timesteps(steps)
    x = torch.tensor(x) * float(scheduler.init_noise_sigma)
    trajectory = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.tensor(network(seen.numpy(), t)), t, x).prev_sample
        trajectory.append(x.numpy())
    return trajectory


def accepts(kind, config):
    return config.keys() <= inspect.signature(kind.__init__).parameters.keys()


CASES = [
    (name, config)
    for name, (kind, _) in PEERS.items()
    for config in CONFIGS
    if accepts(kind, CONFIGS[config])
]


def fails_there(name, config, steps):
    """Where their scheduler cannot run, or gives what is not a number."""
    offset = CONFIGS[config].get("steps_offset", 0)
    leading = CONFIGS[config].get("timestep_spacing") == "leading"
    if name == "pndm":
        # Runge-Kutta wants four steps; with an offset the first of 1,000 is past the last trained.
        short = steps < 4 and not CONFIGS[config].get("skip_prk_steps")
        return short or (steps == 1000 and offset > 0)
    if name.startswith("dpm") and not config.startswith("Karras") and config != "trailing":
        # It cuts one step more, and so meets the same one twice or, here, only one.
        return steps == 1000 or (steps == 999 and leading)
    return False


def differs(name, config, steps):
    """Where theirs is not the algorithm: PNDM takes t − T // n for the next step.

    That is not the next one visited where they are spaced otherwise; and half of an odd T // n is
    another number for the image than for the network.
    """
    if name != "pndm" or CONFIGS[config].get("skip_prk_steps"):
        return False
    uneven = config == "linspace" or (config == "trailing" and 1000 % steps)
    return uneven or (1000 // steps) % 2 == 1


def ours_and_theirs(name, config, prediction, steps, monkeypatch):
    """The config, and whole trajectories; theirs is None where it fails."""
    kind, options = PEERS[name]
    settings = STABLE_DIFFUSION | CONFIGS[config] | options | {"prediction_type": prediction}
    x, *noises = np.random.default_rng(steps).normal(size=(steps + 2, 2, 3))
    feed = iter(noises)
    for module in MODULES:
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(next(feed)))
    with InFloat64():
        theirs = kind(**settings)
    schedule = Schedule(dict(theirs.config))
    options = {"noise": iter(noises).__next__} if SAMPLERS[name].needs_noise else {}
    found = np.array([y for y, _ in SAMPLERS[name](network, schedule, x, steps, **options)])
    if fails_there(name, config, steps):
        return schedule.config, found, None
    with InFloat64():
        expected = np.array(their_trajectory(theirs, x, steps))
    if name == "heun":  # two predictions a step, but for the last
        expected = expected[[*range(1, 2 * steps - 2, 2), 2 * steps - 2]]
    elif name == "pndm" and theirs.config.skip_prk_steps:  # two for the first step
        expected = expected[min(1, steps - 1) :]
    elif name == "pndm":  # four for each of the first three steps
        expected = np.concatenate([expected[3:12:4], expected[12:]])
    if not name.startswith(("pndm", "dpm")):  # theirs are in the coordinates of Karras et al.
        sigmas = sigma_steps(schedule, steps)[1][1:]
        if CONFIGS[config].get("final_sigmas_type") == "sigma_min":
            sigmas[-1] = schedule.sigmas[0]
        expected = expected / np.sqrt(1 + sigmas**2)[:, None, None]
    return schedule.config, found, expected


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name, config", CASES)
def test_the_whole_trajectory(name, config, prediction, monkeypatch):
    compared = 0
    for steps in STEPS:
        _, found, expected = ours_and_theirs(name, config, prediction, steps, monkeypatch)
        assert found.shape == (steps, 2, 3) and np.isfinite(found).all()
        if expected is not None and not differs(name, config, steps):
            scale = max(1, abs(expected).max())
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * scale)
            compared += 1
    assert compared >= (3 if name != "pndm" or config != "linspace" else 0)


@pytest.mark.parametrize("name, config", CASES)
def test_where_theirs_fails_it_does(name, config, monkeypatch):
    """So that the list above is no longer than it must be."""
    for steps in STEPS:
        if fails_there(name, config, steps):
            with monkeypatch.context() as patch:
                patch.setitem(globals(), "fails_there", lambda *_: False)
                try:
                    with np.errstate(all="ignore"):
                        made = ours_and_theirs(name, config, "epsilon", steps, monkeypatch)
                except (ValueError, IndexError):
                    continue
            assert not np.isfinite(made[2]).all()
