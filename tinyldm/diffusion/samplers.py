"""The reverse process: from noise to a sample, one function for each algorithm.

A sampler is a generator. It takes `predict(x, t) → what the schedule's network predicts` and the
start noise, and after each step yields `(x, x0)`: where it stands, and the picture that it would
jump to from there. The last x is the sample.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from tinyldm.backend import Array, array_module
from tinyldm.diffusion.schedule import Schedule, posterior

Predict = Callable[[Array, int], Array]
Noise = Callable[[], Array]  # fresh standard normal noise, of the shape of x


def timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    """The steps t (steps,) to visit, falling, as the scheduler config's `timestep_spacing` says.

    "leading" visits 0, T/n, 2T/n … plus `steps_offset`, "trailing" T−1, T−1−T/n …, "linspace" both
    ends. Where the offset would lead past the last trained step, that step is taken.

    Raises ValueError for more steps than were trained, or an unknown spacing.
    """
    total = len(schedule)
    if not 1 <= steps <= total:
        raise ValueError(f"steps: expected 1…{total}, found {steps}")
    spacing = schedule.config.get("timestep_spacing", "leading")
    if spacing == "leading":
        t = np.arange(steps)[::-1] * (total // steps) + schedule.config.get("steps_offset", 0)
    elif spacing == "trailing":
        t = np.round(total - np.arange(steps) * (total / steps)) - 1
    elif spacing == "linspace":
        t = np.round(np.linspace(0, total - 1, steps))[::-1]
    else:
        raise ValueError(
            f"timestep_spacing: expected leading, trailing or linspace, found {spacing!r}"
        )
    return np.minimum(t, total - 1).astype(np.int64)


def ddim(
    predict: Predict,
    schedule: Schedule,
    x: Array,
    steps: int,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Iterator[tuple[Array, Array]]:
    """Denoising diffusion implicit models (Song et al. 2020, eq. 12 and 16).

    eta: 0 deterministic … 1 as random as DDPM; then `noise()` gives fresh normal noise like x.
    """
    t = timesteps(schedule, steps)
    first = float(schedule.alphas_bar[0])
    last = 1.0 if schedule.config.get("set_alpha_to_one", True) else first
    alphas_bar = [*schedule.alphas_bar[t].tolist(), last]  # Python's numbers keep x in float32
    for i in range(steps):
        now, then = alphas_bar[i : i + 2]
        x0, epsilon = _split(schedule, predict(x, t[i]), x, now)
        variance = eta**2 * posterior(now, then)[2]
        x = math.sqrt(then) * x0 + math.sqrt(max(0.0, 1 - then - variance)) * epsilon
        if variance > 0:
            x = x + math.sqrt(variance) * noise()
        yield x, x0


def ddpm(
    predict: Predict, schedule: Schedule, x: Array, steps: int, noise: Noise
) -> Iterator[tuple[Array, Array]]:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, algorithm 2)."""
    t = timesteps(schedule, steps)
    alphas_bar = [*schedule.alphas_bar[t].tolist(), 1.0]
    for i in range(steps):
        x0, _ = _split(schedule, predict(x, t[i]), x, alphas_bar[i])
        x0_weight, xt_weight, variance = posterior(alphas_bar[i], alphas_bar[i + 1])
        x = x0_weight * x0 + xt_weight * x
        if i + 1 < steps:
            x = x + math.sqrt(variance) * noise()
        yield x, x0


def _split(schedule, prediction, x, alpha_bar):
    """x_0 and ε at x; x_0 is clipped where the scheduler config says so, as for pixels."""
    x0, epsilon = schedule.split(prediction, x, alpha_bar)
    if schedule.config.get("clip_sample", True):
        limit = schedule.config.get("clip_sample_range", 1.0)
        x0 = array_module(x0).clip(x0, -limit, limit)
    return x0, epsilon


SAMPLERS = {"ddim": ddim, "ddpm": ddpm}


def guided(predict: Predict, guidance: float) -> Predict:
    """Classifier-free guidance: a `predict` for a sampler, from one for twice as many samples.

    Of those the first half is predicted without text, the second with it. The result is away from
    the first by `guidance` times the way to the second; 1 is plain conditional (Ho & Salimans 2022,
    eq. 6, with their w = guidance − 1).
    """

    def predict_guided(x, t):
        xp = array_module(x)
        without, with_text = xp.split(predict(xp.concatenate([x, x]), t), 2)
        return without + guidance * (with_text - without)

    return predict_guided
