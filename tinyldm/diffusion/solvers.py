"""Samplers that solve the differential equation of Karras et al. 2022.

Their coordinates are x / a: a clean picture plus noise of the standard deviation σ = s / a. There
all of a sampler is in the sequence of its σ, and a step by the straight line to the predicted
picture x0 is a mixture of x and x0. What is yielded is x in the coordinates of the other samplers.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from tinyldm.backend import Array
from tinyldm.config import ConfigError
from tinyldm.diffusion.schedule import Schedule, check_steps, spaced

Predict = Callable[[Array, float], Array]  # x, t → what the schedule's network predicts
Noise = Callable[[], Array]  # fresh standard normal noise, of the shape of x
Steps = Iterator[tuple[Array, Array]]  # of x, and the x0 ahead
Change = Callable[[Array, int], Array]  # x after the i-th step taken → x as the next step finds it

RHO = 7.0  # of Karras et al., eq. 5
IMPLEMENTED = {  # values of a scheduler config; others are refused by name
    "use_exponential_sigmas": (None, False),
    "use_beta_sigmas": (None, False),
    "use_flow_sigmas": (None, False),
    "interpolation_type": (None, "linear"),
    "timestep_type": (None, "discrete"),
    "final_sigmas_type": (None, "zero", "sigma_min"),
}
IMPLEMENTED_OF_DPM_SOLVER = IMPLEMENTED | {
    "use_lu_lambdas": (None, False),
    "thresholding": (None, False),
    "solver_order": (None, 2),
    # Of DEIS and UniPC: from their configs, diffusers makes a DPM-Solver++ of the usual kind.
    "solver_type": (None, "midpoint", "logrho", "bh1", "bh2"),
    "euler_at_final": (None, False),
    "algorithm_type": (None, "dpmsolver++", "sde-dpmsolver++", "deis"),
}


def as_it_is(x: Array, i: int) -> Array:
    """The `Change` that is none."""
    return x


def euler(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    start: int | None = None,
    change: Change = as_it_is,
) -> Steps:
    """Straight lines to the picture ahead (Karras et al. 2022, algorithm 1 without correction)."""
    t, sigmas, x = _begin(schedule, x, steps, start)
    sigmas[-1] = _last(schedule)
    for i in range(len(t)):
        x0 = _picture(predict, schedule, x, sigmas[i], t[i])
        x = _towards(x, x0, sigmas[i + 1] / sigmas[i])
        latents, x = _changed(x, sigmas[i + 1], change, i)
        yield latents, x0


def euler_ancestral(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    noise: Noise,
    start: int | None = None,
    change: Change = as_it_is,
) -> Steps:
    """Further than σ at each step, and fresh noise back up to it, as DDPM (Song et al. 2020)."""
    t, sigmas, x = _begin(schedule, x, steps, start)
    for i in range(len(t)):
        now, then = sigmas[i : i + 2]
        x0 = _picture(predict, schedule, x, now, t[i])
        x = _towards(x, x0, (then / now) ** 2)
        if then > 0:
            x = x + then * math.sqrt(1 - (then / now) ** 2) * noise()
        latents, x = _changed(x, then, change, i)
        yield latents, x0


def heun(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    start: int | None = None,
    change: Change = as_it_is,
) -> Steps:
    """A step with the mean of the slopes at its two ends (Karras et al. 2022, algorithm 1).

    The last step, to σ = 0, has one end alone: 2 · steps − 1 predictions.
    """
    t, sigmas, x = _begin(schedule, x, steps, start)
    for i in range(len(t)):
        now, then = sigmas[i : i + 2]
        x0 = _picture(predict, schedule, x, now, t[i])
        ahead = _towards(x, x0, then / now)
        if then > 0:
            x0_ahead = _picture(predict, schedule, ahead, then, t[i + 1])
            slope = 0.5 * ((x - x0) * (1 / now) + (ahead - x0_ahead) * (1 / then))
            ahead, x0 = x + (then - now) * slope, x0_ahead
        latents, x = _changed(ahead, then, change, i)
        yield latents, x0


def dpm_solver_2m(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    noise: Noise | None = None,
    start: int | None = None,
    change: Change = as_it_is,
) -> Steps:
    """DPM-Solver++ (2M) (Lu et al. 2022b, algorithm 2).

    The picture ahead is carried on in log σ from the last two. With `noise`, its stochastic
    variant, SDE-DPM-Solver++ (2M) (section 5 and appendix B there).
    """
    t, sigmas = (table[start:].tolist() for table in dpm_solver_steps(schedule, steps))
    x = x * math.sqrt(1 + sigmas[0] ** 2)
    previous = None  # x0, and the length of the step after it in log σ
    for i in range(len(t)):
        now, then = sigmas[i : i + 2]
        ratio = then / now
        length = -math.log(ratio) if ratio > 0 else math.inf
        x0 = goal = _picture(predict, schedule, x, now, t[i])
        last = i + 1 == len(t) and (then == 0 or steps < 15)
        if previous and previous[1] > 0 and not last:
            goal = x0 + (x0 - previous[0]) * (length / (2 * previous[1]))
        if noise is None:
            x = _towards(x, goal, ratio)
        else:
            x = _towards(x, goal, ratio**2)
            if then > 0:
                x = x + then * math.sqrt(1 - ratio**2) * noise()
        previous = x0, length
        latents, x = _changed(x, then, change, i)
        yield latents, x0


# --------------------------------------------------------------------------------------- what is σ?


def sigma_steps(schedule: Schedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The time steps t (steps,), not always whole, and σ (steps + 1,), both falling.

    Spaced as the scheduler config's `timestep_spacing` says, by default "linspace"; with
    `use_karras_sigmas` as Karras et al. 2022, eq. 5, between the same ends. σ ends with 0. Raises
    ValueError for more steps than were trained, or an unknown spacing.
    """
    _check(schedule, steps, IMPLEMENTED)
    t = spaced(schedule, steps, "linspace")
    sigmas = np.interp(t, np.arange(len(schedule)), schedule.sigmas)
    if schedule.config.get("use_karras_sigmas"):
        sigmas = _karras(sigmas[-1], sigmas[0], steps)
        t = _time_of(schedule, sigmas)
    return t, np.append(sigmas, 0.0)


def dpm_solver_steps(schedule: Schedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for DPM-Solver++, which leaves out the last of one step more, and rounds t.

    σ ends with the smallest trained where `final_sigmas_type` is "sigma_min".
    """
    _check(schedule, steps, IMPLEMENTED_OF_DPM_SOLVER)
    total = len(schedule)
    if schedule.config.get("use_karras_sigmas"):
        sigmas = _karras(schedule.sigmas[0], schedule.sigmas[-1], steps)
        t = _time_of(schedule, sigmas)
        if schedule.config.get("beta_schedule") != "squaredcos_cap_v2":
            t = np.round(t)
        return t.astype(np.int64), np.append(sigmas, _last(schedule))
    spacing = schedule.config.get("timestep_spacing", "linspace")
    if spacing == "leading":
        offset = schedule.config.get("steps_offset", 0)
        t = np.arange(1, steps + 1)[::-1] * (total // (steps + 1)) + offset
    elif spacing == "linspace":
        t = np.round(np.linspace(0, total - 1, steps + 1))[:0:-1]
    else:
        t = spaced(schedule, steps, spacing)
    sigmas = np.interp(t, np.arange(total), schedule.sigmas)
    return t.astype(np.int64), np.append(sigmas, _last(schedule))


def _check(schedule, steps, implemented):
    check_steps(schedule, steps)
    for key, values in implemented.items():
        value = schedule.config.get(key)
        if value not in values:
            known = " or ".join(map(str, values[1:]))
            raise ConfigError(
                f"scheduler config: {key} = {value!r} is not implemented for this sampler, only "
                f"{known}; take ddim"
            )


def _karras(least, most, steps):
    return np.linspace(most ** (1 / RHO), least ** (1 / RHO), steps) ** RHO


def _time_of(schedule, sigmas):
    """The time steps, not always whole, at which log σ has these values."""
    return np.interp(np.log(sigmas), np.log(schedule.sigmas), np.arange(len(schedule)))


def _last(schedule):
    """The σ at which a sampler ends: 0, or the smallest trained."""
    least = schedule.config.get("final_sigmas_type") == "sigma_min"
    return schedule.sigmas[0] if least else 0.0


# ----------------------------------------------------------------------------------------- one step


def _begin(schedule, x, steps, start):
    """t, σ, and x as it stands before the first step."""
    t, sigmas = sigma_steps(schedule, steps)
    t, sigmas = t[start:], sigmas[start:].tolist()
    # Where the last trained step is among those visited, x alone is taken for noise alone.
    leading = schedule.config.get("timestep_spacing", "linspace") == "leading"
    if leading or start is not None:
        return t, sigmas, x * math.sqrt(sigmas[0] ** 2 + 1)
    return t, sigmas, x * sigmas[0]


def _picture(predict, schedule, x, sigma, t):
    alpha_bar = 1 / (1 + sigma**2)
    x = x * math.sqrt(alpha_bar)
    return schedule.split(predict(x, t), x, alpha_bar)[0]


def _towards(x, x0, ratio):
    """Where σ is `ratio` times what it was, on the line to x0."""
    return x0 + (x - x0) * float(ratio)


def _changed(x, sigma, change, i):
    """x after a step: in the coordinates of the other samplers, which `change` knows, and here."""
    a = 1 / math.sqrt(1 + sigma**2)
    latents = x * a
    if change is as_it_is:
        return latents, x
    latents = change(latents, i)
    return latents, latents * (1 / a)
