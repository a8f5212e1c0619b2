"""The reverse process: from noise to a sample, one function for each algorithm.

A sampler is a generator. It takes `predict(x, t) → what the schedule's network predicts` and the
start noise, and after each step yields `(x, x0)`: the current x, and the predicted clean image.
The last x is the sample.

Two options are the same for all, in a `Span`: where to begin, and what to do after each step.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from tinyldm.backend import Array, array_module
from tinyldm.diffusion.schedule import Schedule, posterior
from tinyldm.diffusion.scheduler_config import check_sampler
from tinyldm.diffusion.timesteps import (
    dpm_solver_steps,
    last_sigma,
    levels_of_sigmas,
    levels_of_timesteps,
    sigma_steps,
    timesteps,
)

Predict = Callable[[Array, float], Array]  # x, t → what the schedule's network predicts
Noise = Callable[[], Array]  # fresh standard normal noise, of the shape of x
Steps = Iterator[tuple[Array, Array]]  # of x and the predicted x0
PostStep = Callable[[Array, int], Array]  # x after the i-th step taken → x as the next one finds it


@dataclass(frozen=True)
class Span:
    """Span of the steps that a sampler takes: from `start` on, counted from 0, to the end.

    From a start, even 0, x are latents with the noise level that the sampler's `levels` says there,
    not pure noise. post_step: `post_step(x, i)` returns the x that replaces x after the i-th step.
    """

    start: int | None = None
    post_step: PostStep = lambda x, i: x


ALL = Span()


def ddim(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    eta: float = 0.0,
    noise: Noise | None = None,
    span: Span = ALL,
) -> Steps:
    """Denoising diffusion implicit models: x' = √ᾱ' x_0 + √(1 − ᾱ' − σ²) ε + σ · fresh noise.

    Song, Meng & Ermon 2020, eq. 12; σ is η times that of DDPM (eq. 16).
    eta: 0 deterministic … 1 as random as DDPM; then `noise()` gives fresh normal noise like x.
    """
    t = timesteps(schedule, steps)[span.start :]
    last = _final_alpha_bar(schedule, default=True)
    alphas_bar = [*schedule.alphas_bar[t].tolist(), last]  # Python floats keep x in float32
    for i in range(len(t)):
        alpha_bar, next_alpha_bar = alphas_bar[i : i + 2]
        x0, epsilon = _split(schedule, predict(x, t[i]), x, alpha_bar)
        variance = eta**2 * posterior(alpha_bar, next_alpha_bar)[2]
        rest = max(0.0, 1 - next_alpha_bar - variance)
        x = math.sqrt(next_alpha_bar) * x0 + math.sqrt(rest) * epsilon
        if variance > 0:
            x = x + math.sqrt(variance) * noise()
        x = span.post_step(x, i)
        yield x, x0


def ddpm(
    predict: Predict, schedule: Schedule, x: Array, steps: int, noise: Noise, span: Span = ALL
) -> Steps:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, algorithm 2).

    With the scheduler config's `variance_type` "fixed_large" the variance is β (section 3.2).
    """
    large = schedule.config.get("variance_type") == "fixed_large"
    t = timesteps(schedule, steps)[span.start :]
    alphas_bar = [*schedule.alphas_bar[t].tolist(), 1.0]
    for i in range(len(t)):
        x0, _ = _split(schedule, predict(x, t[i]), x, alphas_bar[i])
        x0_weight, xt_weight, variance = posterior(alphas_bar[i], alphas_bar[i + 1])
        x = x0_weight * x0 + xt_weight * x
        if large:
            variance = 1 - alphas_bar[i] / alphas_bar[i + 1]
        if i + 1 < len(t):
            x = x + math.sqrt(variance) * noise()
        x = span.post_step(x, i)
        yield x, x0


def pndm(predict: Predict, schedule: Schedule, x: Array, steps: int, span: Span = ALL) -> Steps:
    """Pseudo numerical methods: DDIM with a prediction extrapolated from the last four.

    Liu et al. 2022, eq. 9, 11 and 12. The first three steps are pseudo Runge-Kutta (eq. 13), of
    four predictions each. With fewer than four steps, or the scheduler config's `skip_prk_steps`,
    as Stable Diffusion has it, the first is corrected once and the next extrapolate from fewer.
    """
    t = timesteps(schedule, steps)[span.start :].tolist()
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
        x = span.post_step(x, i)
        yield x, x0


ADAMS_BASHFORTH = {  # by how many predictions there are, the oldest first
    1: (1.0,),
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
}


def _runge_kutta(predict, schedule, x, first, here, ahead):
    """Return the prediction with which to step from `here` to `ahead`, both (t, ᾱ)."""
    middle = here[0] - (here[0] - ahead[0]) // 2
    half_way = middle, float(schedule.alphas_bar[middle])
    predictions = [first]
    for t, alpha_bar in (half_way, half_way, ahead):
        guess, _ = _transfer(schedule, predictions[-1], x, here[1], alpha_bar)
        predictions.append(predict(guess, t))
    return sum(w * p for w, p in zip((1 / 6, 1 / 3, 1 / 3, 1 / 6), predictions, strict=True))


def _transfer(schedule, prediction, x, alpha_bar, next_alpha_bar):
    """Step from one ᾱ to the next by DDIM without noise → x, x_0."""
    x0, epsilon = schedule.split(prediction, x, alpha_bar)
    return math.sqrt(next_alpha_bar) * x0 + math.sqrt(1 - next_alpha_bar) * epsilon, x0


def _final_alpha_bar(schedule, default):
    """Return ᾱ after the last step: 1 or, as in Stable Diffusion, that of the first time step."""
    to_one = schedule.config.get("set_alpha_to_one", default)
    return 1.0 if to_one else float(schedule.alphas_bar[0])


def _split(schedule, prediction, x, alpha_bar):
    """Split a prediction at x into x_0 and ε; x_0 is clipped where the scheduler config says so."""
    x0, epsilon = schedule.split(prediction, x, alpha_bar)
    if schedule.config.get("clip_sample", True):
        limit = schedule.config.get("clip_sample_range", 1.0)
        x0 = array_module(x0).clip(x0, -limit, limit)
    return x0, epsilon


# --------------------------------------------------------------------------------- steps in σ
# These solve the differential equation of Karras et al. 2022. Their coordinates are x / a: a clean
# image plus noise of the standard deviation σ = s / a. There a sampler is given by the sequence of
# its σ, and a step along the straight line to the predicted image x0 mixes x and x0. The
# yielded x is in the coordinates of the other samplers.


def euler(predict: Predict, schedule: Schedule, x: Array, steps: int, span: Span = ALL) -> Steps:
    """Euler steps straight towards x0 (Karras et al. 2022, algorithm 1 without correction)."""
    t, sigmas, x = _begin(schedule, x, steps, span)
    sigmas[-1] = last_sigma(schedule)
    for i in range(len(t)):
        x0 = _clean_image(predict, schedule, x, sigmas[i], t[i])
        x = _towards(x, x0, sigmas[i + 1] / sigmas[i])
        latents, x = _changed(x, sigmas[i + 1], span, i)
        yield latents, x0


def euler_ancestral(
    predict: Predict, schedule: Schedule, x: Array, steps: int, noise: Noise, span: Span = ALL
) -> Steps:
    """Ancestral Euler: step below the next σ, then add fresh noise up to it, as DDPM does."""
    t, sigmas, x = _begin(schedule, x, steps, span)
    for i in range(len(t)):
        sigma, next_sigma = sigmas[i : i + 2]
        x0 = _clean_image(predict, schedule, x, sigma, t[i])
        x = _towards(x, x0, (next_sigma / sigma) ** 2)
        if next_sigma > 0:
            x = x + next_sigma * math.sqrt(1 - (next_sigma / sigma) ** 2) * noise()
        latents, x = _changed(x, next_sigma, span, i)
        yield latents, x0


def heun(predict: Predict, schedule: Schedule, x: Array, steps: int, span: Span = ALL) -> Steps:
    """Heun's method: step with the mean of the slopes at both ends (Karras et al. 2022, alg. 1).

    The last step, to σ = 0, has one end alone: 2 · steps − 1 predictions.
    """
    t, sigmas, x = _begin(schedule, x, steps, span)
    for i in range(len(t)):
        sigma, next_sigma = sigmas[i : i + 2]
        x0 = _clean_image(predict, schedule, x, sigma, t[i])
        ahead = _towards(x, x0, next_sigma / sigma)
        if next_sigma > 0:
            x0_ahead = _clean_image(predict, schedule, ahead, next_sigma, t[i + 1])
            slope = 0.5 * ((x - x0) * (1 / sigma) + (ahead - x0_ahead) * (1 / next_sigma))
            ahead, x0 = x + (next_sigma - sigma) * slope, x0_ahead
        latents, x = _changed(ahead, next_sigma, span, i)
        yield latents, x0


def dpm_solver_2m(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    noise: Noise | None = None,
    span: Span = ALL,
) -> Steps:
    """DPM-Solver++ (2M) (Lu et al. 2022b, algorithm 2).

    x0 is extrapolated in log σ from the last two predictions. With `noise` it is the stochastic
    variant, SDE-DPM-Solver++ (2M) (section 5 and appendix B there).
    """
    t, sigmas = (table[span.start :].tolist() for table in dpm_solver_steps(schedule, steps))
    x = x * math.sqrt(1 + sigmas[0] ** 2)
    few = schedule.config.get("lower_order_final", True) and steps < 15
    first_order_last = few or schedule.config.get("euler_at_final", False)
    previous = None  # x0, and the length of the step after it in log σ
    for i in range(len(t)):
        sigma, next_sigma = sigmas[i : i + 2]
        ratio = next_sigma / sigma
        length = -math.log(ratio) if ratio > 0 else math.inf
        x0 = goal = _clean_image(predict, schedule, x, sigma, t[i])
        last = i + 1 == len(t) and (next_sigma == 0 or first_order_last)
        if previous and previous[1] > 0 and not last:
            goal = x0 + (x0 - previous[0]) * (length / (2 * previous[1]))
        if noise is None:
            x = _towards(x, goal, ratio)
        else:
            x = _towards(x, goal, ratio**2)
            if next_sigma > 0:
                x = x + next_sigma * math.sqrt(1 - ratio**2) * noise()
        previous = x0, length
        latents, x = _changed(x, next_sigma, span, i)
        yield latents, x0


def _begin(schedule, x, steps, span):
    """Return t, σ, and x before the first step, in the coordinates of these samplers."""
    t, sigmas = sigma_steps(schedule, steps)
    t, sigmas = t[span.start :], sigmas[span.start :].tolist()
    # As in diffusers: where the last trained step is visited, x counts as noise alone.
    leading = schedule.config.get("timestep_spacing", "linspace") == "leading"
    noise_alone = not leading and span.start is None
    return t, sigmas, x * (sigmas[0] if noise_alone else math.sqrt(sigmas[0] ** 2 + 1))


def _clean_image(predict, schedule, x, sigma, t):
    alpha_bar = 1 / (1 + sigma**2)
    x = x * math.sqrt(alpha_bar)
    return schedule.split(predict(x, t), x, alpha_bar)[0]


def _towards(x, x0, ratio):
    """Move x along the line to x0, to where σ is `ratio` times as large."""
    return x0 + (x - x0) * float(ratio)


def _changed(x, sigma, span, i):
    """Apply `post_step` in the coordinates of the other samplers → x there, and x here."""
    a = 1 / math.sqrt(1 + sigma**2)
    latents = x * a
    if span.post_step is ALL.post_step:
        return latents, x
    latents = span.post_step(latents, i)
    return latents, latents * (1 / a)


# ------------------------------------------------------------------------------------ the samplers


@dataclass(frozen=True)
class Sampler:
    """A sampler, called as its function is: `sampler(predict, schedule, x, steps, …)`."""

    function: Callable[..., Steps]
    scheduler: str  # the equivalent class of diffusers
    levels: Callable[[Schedule, int], np.ndarray]  # ᾱ (steps,) at which the steps begin
    needs_noise: bool = False  # `noise`, fresh at each step

    def __call__(
        self, predict: Predict, schedule: Schedule, x: Array, steps: int, **options: object
    ) -> Steps:
        """Yield (x, x0) after each step, from noise x (n, ...). options: also those of Span.

        Raises ConfigError for a scheduler config that asks for more than the sampler can do.
        """
        check_sampler(schedule.config, self.scheduler)
        given = {name: options.pop(name) for name in ("start", "post_step") if name in options}
        return self.function(predict, schedule, x, steps, span=Span(**given), **options)


in_sigma = partial(levels_of_sigmas, sigma_steps)
in_solver_sigma = partial(levels_of_sigmas, dpm_solver_steps)
SAMPLERS = {
    "ddpm": Sampler(ddpm, "DDPMScheduler", levels_of_timesteps, needs_noise=True),
    "ddim": Sampler(ddim, "DDIMScheduler", levels_of_timesteps),
    "pndm": Sampler(pndm, "PNDMScheduler", levels_of_timesteps),
    "euler": Sampler(euler, "EulerDiscreteScheduler", in_sigma),
    "euler_a": Sampler(
        euler_ancestral, "EulerAncestralDiscreteScheduler", in_sigma, needs_noise=True
    ),
    "heun": Sampler(heun, "HeunDiscreteScheduler", in_sigma),
    "dpm++2m": Sampler(dpm_solver_2m, "DPMSolverMultistepScheduler", in_solver_sigma),
    "dpm++2m_sde": Sampler(
        dpm_solver_2m, "DPMSolverMultistepScheduler", in_solver_sigma, needs_noise=True
    ),
}


def sampler_of(config: dict) -> str:
    """Return our name of the scheduler that a config names, or its own name where there is none."""
    kind = config.get("_class_name", "DDIMScheduler")
    if kind == "DPMSolverMultistepScheduler":
        return "dpm++2m" + "_sde" * str(config.get("algorithm_type")).startswith("sde")
    names = (name for name, sampler in SAMPLERS.items() if sampler.scheduler == kind)
    return next(names, kind)
