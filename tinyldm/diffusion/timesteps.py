"""The time steps that a sampler visits, and how much noise there is at each.

Samplers count noise by ᾱ or by σ = √(1 − ᾱ) / √ᾱ, noise relative to signal (Karras et al. 2022).
"""

from collections.abc import Callable

import numpy as np

from tinyldm.config import brief
from tinyldm.diffusion.schedule import Schedule

RHO = 7.0  # of Karras et al., eq. 5


def check_steps(schedule: Schedule, steps: int) -> None:
    """Raise ValueError for fewer sampling steps than one, or more than were trained."""
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"steps: expected 1…{len(schedule)}, found {brief(steps)}")


def spaced(schedule: Schedule, steps: int, default: str) -> np.ndarray:
    """Return the time steps t (steps,), falling, spaced as the config's `timestep_spacing` says.

    "leading" visits 0, T/n, 2T/n … plus `steps_offset`, "trailing" T−1, T−1−T/n …, "linspace" both
    ends, and fractional steps between them.
    """
    total = len(schedule)
    spacing = schedule.config.get("timestep_spacing", default)
    if spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps) + schedule.config.get("steps_offset", 0)
    if spacing == "trailing":
        return np.round(total - np.arange(steps) * (total / steps)) - 1
    return np.linspace(0, total - 1, steps)[::-1]


def timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    """Return the steps t (steps,) to visit, falling, as the config's `timestep_spacing` says.

    By default "leading". A step past the last trained one, by the offset, becomes that one.

    Raises ValueError for more steps than were trained.
    """
    check_steps(schedule, steps)
    t = np.round(spaced(schedule, steps, "leading"))
    return np.minimum(t, len(schedule) - 1).astype(np.int64)


def sigma_steps(schedule: Schedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the time steps t (steps,), possibly fractional, and σ (steps + 1,), both falling.

    Spaced as the scheduler config's `timestep_spacing` says, by default "linspace"; with
    `use_karras_sigmas` as Karras et al. 2022, eq. 5, between the same ends. σ ends with 0. Raises
    ValueError for more steps than were trained.
    """
    check_steps(schedule, steps)
    t = spaced(schedule, steps, "linspace")
    sigmas = np.interp(t, np.arange(len(schedule)), schedule.sigmas)
    if schedule.config.get("use_karras_sigmas"):
        sigmas = _karras(schedule, sigmas[-1], sigmas[0], steps)
        t = _time_of(schedule, sigmas)
    return t, np.append(sigmas, 0.0)


def dpm_solver_steps(schedule: Schedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return t (steps,), rounded, and σ (steps + 1,) of DPM-Solver++, both falling.

    With "leading" and "linspace" they are `steps` + 1 points of the spacing without the last, with
    "trailing" or Karras' σ they are `steps` points.

    σ ends with the smallest trained where `final_sigmas_type` is "sigma_min".
    """
    check_steps(schedule, steps)
    total = len(schedule)
    if schedule.config.get("use_karras_sigmas"):
        sigmas = _karras(schedule, schedule.sigmas[0], schedule.sigmas[-1], steps)
        t = _time_of(schedule, sigmas)
        if schedule.config.get("beta_schedule") != "squaredcos_cap_v2":
            t = np.round(t)
        return t.astype(np.int64), np.append(sigmas, last_sigma(schedule))
    spacing = schedule.config.get("timestep_spacing", "linspace")
    if spacing == "leading":
        offset = schedule.config.get("steps_offset", 0)
        t = np.arange(1, steps + 1)[::-1] * (total // (steps + 1)) + offset
    elif spacing == "linspace":
        t = np.round(np.linspace(0, total - 1, steps + 1))[:0:-1]
    else:
        t = spaced(schedule, steps, spacing)
    sigmas = np.interp(t, np.arange(total), schedule.sigmas)
    return t.astype(np.int64), np.append(sigmas, last_sigma(schedule))


def _karras(schedule, least, most, steps):
    """Return σ (steps,), falling, between the config's own ends or these (eq. 5)."""
    own = schedule.config.get("sigma_min"), schedule.config.get("sigma_max")
    least, most = (
        given if own is None else own for own, given in zip(own, (least, most), strict=True)
    )
    return np.linspace(most ** (1 / RHO), least ** (1 / RHO), steps) ** RHO


def _time_of(schedule, sigmas):
    """Return the time steps, possibly fractional, at which log σ has these values."""
    return np.interp(np.log(sigmas), np.log(schedule.sigmas), np.arange(len(schedule)))


def last_sigma(schedule: Schedule) -> float:
    """Return the σ at which a sampler ends: 0, or the smallest trained."""
    least = schedule.config.get("final_sigmas_type") == "sigma_min"
    return schedule.sigmas[0] if least else 0.0


def levels_of_timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    """Return ᾱ (steps,) at which the steps of DDPM, DDIM and PNDM begin."""
    return schedule.alphas_bar[timesteps(schedule, steps)]


def levels_of_sigmas(
    sigma_steps: Callable[[Schedule, int], tuple[np.ndarray, np.ndarray]],
    schedule: Schedule,
    steps: int,
) -> np.ndarray:
    """Return ᾱ (steps,) at which the steps of a sampler in σ begin, whose steps are given."""
    _, sigmas = sigma_steps(schedule, steps)
    return 1 / (1 + sigmas[:-1] ** 2)
