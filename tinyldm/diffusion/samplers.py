"""The reverse process: from noise to a sample, one function for each algorithm.

A sampler is a generator. It takes `predict(x, t) → what the schedule's network predicts` and the
start noise, and after each step yields `(x, x0)`: where it stands, and the picture that it would
jump to from there. The last x is the sample.

All of them take these two as well. `start`: begin with this step of the `steps`, counted from 0;
then x are latents with as much noise as `levels` says, and not noise alone. `change(x, i)`: what
becomes of x after the i-th step taken.
"""

import math

import numpy as np

from tinyldm.backend import Array, array_module
from tinyldm.diffusion.schedule import Schedule, check_steps, posterior, spaced
from tinyldm.diffusion.solvers import (
    Change,
    Noise,
    Predict,
    Steps,
    as_it_is,
    dpm_solver_2m,
    dpm_solver_steps,
    euler,
    euler_ancestral,
    heun,
    sigma_steps,
)


def timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    """The steps t (steps,) to visit, falling, as the scheduler config's `timestep_spacing` says.

    By default "leading". Where the offset would lead past the last trained step, that is taken.

    Raises ValueError for more steps than were trained, or an unknown spacing.
    """
    check_steps(schedule, steps)
    t = np.round(spaced(schedule, steps, "leading"))
    return np.minimum(t, len(schedule) - 1).astype(np.int64)


def ddim(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    eta: float = 0.0,
    noise: Noise | None = None,
    start: int | None = None,
    change: Change = as_it_is,
) -> Steps:
    """Denoising diffusion implicit models (Song et al. 2020, eq. 12 and 16).

    eta: 0 deterministic … 1 as random as DDPM; then `noise()` gives fresh normal noise like x.
    """
    t = timesteps(schedule, steps)[start:]
    last = _final_alpha_bar(schedule, default=True)
    alphas_bar = [*schedule.alphas_bar[t].tolist(), last]  # Python's numbers keep x in float32
    for i in range(len(t)):
        now, then = alphas_bar[i : i + 2]
        x0, epsilon = _split(schedule, predict(x, t[i]), x, now)
        variance = eta**2 * posterior(now, then)[2]
        x = math.sqrt(then) * x0 + math.sqrt(max(0.0, 1 - then - variance)) * epsilon
        if variance > 0:
            x = x + math.sqrt(variance) * noise()
        x = change(x, i)
        yield x, x0


def ddpm(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    noise: Noise,
    start: int | None = None,
    change: Change = as_it_is,
) -> Steps:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, algorithm 2)."""
    t = timesteps(schedule, steps)[start:]
    alphas_bar = [*schedule.alphas_bar[t].tolist(), 1.0]
    for i in range(len(t)):
        x0, _ = _split(schedule, predict(x, t[i]), x, alphas_bar[i])
        x0_weight, xt_weight, variance = posterior(alphas_bar[i], alphas_bar[i + 1])
        x = x0_weight * x0 + xt_weight * x
        if i + 1 < len(t):
            x = x + math.sqrt(variance) * noise()
        x = change(x, i)
        yield x, x0


def pndm(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    start: int | None = None,
    change: Change = as_it_is,
) -> Steps:
    """Pseudo linear multistep: DDIM with a prediction carried on from the last four.

    Liu et al. 2022, eq. 9, 11 and 12. The first three steps are pseudo Runge-Kutta (eq. 13), of
    four predictions each. With fewer than four steps, or the scheduler config's `skip_prk_steps`,
    as Stable Diffusion has it, the first is corrected once and the next carry on from fewer.
    """
    t = timesteps(schedule, steps)[start:].tolist()
    steps = len(t)
    alphas_bar = [*schedule.alphas_bar[t].tolist(), _final_alpha_bar(schedule, default=False)]
    runge_kutta = steps > 3 and not schedule.config.get("skip_prk_steps", False)
    known = []
    for i in range(steps):
        known = [*known[-3:], predict(x, t[i])]
        if runge_kutta and i < 3:
            here, ahead = zip(t[i : i + 2], alphas_bar[i : i + 2], strict=True)
            prediction = _runge_kutta(predict, schedule, x, known[-1], here, ahead)
        elif i == 0 and steps > 1:
            guess, _ = _transfer(schedule, known[0], x, alphas_bar[0], alphas_bar[1])
            prediction = 0.5 * (known[0] + predict(guess, t[1]))
        else:
            prediction = sum(
                weight * old for weight, old in zip(ADAMS_BASHFORTH[len(known)], known, strict=True)
            )
        x, x0 = _transfer(schedule, prediction, x, alphas_bar[i], alphas_bar[i + 1])
        x = change(x, i)
        yield x, x0


ADAMS_BASHFORTH = {  # by how many predictions there are, the oldest first
    1: (1.0,),
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
}


def _runge_kutta(predict, schedule, x, first, here, ahead):
    """The prediction with which to go from here to ahead, both (t, ᾱ)."""
    middle = here[0] - (here[0] - ahead[0]) // 2
    half_way = middle, float(schedule.alphas_bar[middle])
    predictions = [first]
    for t, alpha_bar in (half_way, half_way, ahead):
        guess, _ = _transfer(schedule, predictions[-1], x, here[1], alpha_bar)
        predictions.append(predict(guess, t))
    return sum(w * p for w, p in zip((1 / 6, 1 / 3, 1 / 3, 1 / 6), predictions, strict=True))


def _transfer(schedule, prediction, x, now, then):
    """x where ᾱ is `then`, by DDIM without noise, and x_0."""
    x0, epsilon = schedule.split(prediction, x, now)
    return math.sqrt(then) * x0 + math.sqrt(1 - then) * epsilon, x0


def _final_alpha_bar(schedule, default):
    """ᾱ after the last step: no noise is left or, as Stable Diffusion has it, the least."""
    to_one = schedule.config.get("set_alpha_to_one", default)
    return 1.0 if to_one else float(schedule.alphas_bar[0])


def _split(schedule, prediction, x, alpha_bar):
    """x_0 and ε at x; x_0 is clipped where the scheduler config says so, as for pixels."""
    x0, epsilon = schedule.split(prediction, x, alpha_bar)
    if schedule.config.get("clip_sample", True):
        limit = schedule.config.get("clip_sample_range", 1.0)
        x0 = array_module(x0).clip(x0, -limit, limit)
    return x0, epsilon


SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "pndm": pndm,
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "dpm++2m": dpm_solver_2m,
    "dpm++2m_sde": dpm_solver_2m,
}
RANDOM = {"ddpm", "euler_a", "dpm++2m_sde"}  # those that draw noise on the way


SIGMA_STEPS = {  # of the samplers that go by σ
    "euler": sigma_steps,
    "euler_a": sigma_steps,
    "heun": sigma_steps,
    "dpm++2m": dpm_solver_steps,
    "dpm++2m_sde": dpm_solver_steps,
}


SCHEDULERS = {  # diffusers' class → our sampler
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm++2m",
}


def sampler_of(config: dict) -> str:
    """The name here of the scheduler that a config names; that itself, where there is none."""
    kind = config.get("_class_name", "DDIMScheduler")
    sampler = SCHEDULERS.get(kind, kind)
    if sampler == "dpm++2m" and str(config.get("algorithm_type")).startswith("sde"):
        return "dpm++2m_sde"
    return sampler


def levels(sampler: str, schedule: Schedule, steps: int) -> np.ndarray:
    """ᾱ (steps,) at which the steps of a sampler begin."""
    if sampler in SIGMA_STEPS:
        _, sigmas = SIGMA_STEPS[sampler](schedule, steps)
        return 1 / (1 + sigmas[:-1] ** 2)
    return schedule.alphas_bar[timesteps(schedule, steps)]


def guided(predict: Predict, guidance: float, rescale: float = 0.0) -> Predict:
    """Classifier-free guidance: a `predict` for a sampler, from one for twice as many samples.

    Of those the first half is predicted without text, the second with it. The result is away from
    the first by `guidance` times the way to the second; 1 is plain conditional (Ho & Salimans 2022,
    eq. 6, with their w = guidance − 1). rescale: 0 none … 1, how far its standard deviation goes
    back to that of the second, against burnt colours (Lin et al. 2023, eq. 15 and 16).
    """

    def predict_guided(x, t):
        xp = array_module(x)
        without, with_text = xp.split(predict(xp.concatenate([x, x]), t), 2)
        prediction = without + guidance * (with_text - without)
        if rescale:
            axes = tuple(range(1, x.ndim))
            ratio = with_text.std(axes, keepdims=True) / prediction.std(axes, keepdims=True)
            prediction *= rescale * ratio + (1 - rescale)
        return prediction

    return predict_guided
