"""Likelihood of data under a diffusion model: the variational bound, in bits per dimension.

Ho et al. 2020, eq. 5, with their larger choice of the reverse variance, β, which is the right one
for data of variance 1, as latents are.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from tinyldm.backend import Array, array_module, to_device
from tinyldm.diffusion.schedule import Schedule, posterior

PredictAt = Callable[[Array, np.ndarray], Array]  # x_t, t (n,) on the host → what it predicts


def bound_terms(
    predict: PredictAt, schedule: Schedule, x0: Array, noise: Array, t: np.ndarray
) -> np.ndarray:
    """Compute the term of step t in the bound, in nats per dimension: (n,), float64, on the host.

    For t > 0 the divergence of q(x_{t−1} | x_t, x_0) from the model's normal distribution; for
    t = 0 the model's −log p(x_0 | x_1), a density. x0, noise (n, …); t (n,) integers.
    """
    x = schedule.add_noise(x0, noise, t)
    prediction = predict(x, t)
    x0_of, x_of, said = (to_device(a, "cpu").astype(np.float64) for a in (x0, x, prediction))
    terms = np.empty(len(t))
    for i, step in enumerate(t):
        now = float(schedule.alphas_bar[step])
        before = float(schedule.alphas_bar[step - 1]) if step else 1.0
        guess, _ = schedule.split(said[i], x_of[i], now)
        of_x0, _, variance = posterior(now, before)
        beta = 1 - now / before
        distance = of_x0**2 * np.square(x0_of[i] - guess).mean() / beta
        if step:
            ratio = variance / beta
            terms[i] = 0.5 * (ratio - 1 - math.log(ratio) + distance)
        else:
            terms[i] = 0.5 * (math.log(2 * math.pi * beta) + distance)
    return terms


def prior_term(schedule: Schedule, x0: Array) -> np.ndarray:
    """Compute the divergence of q(x_T | x_0) from N(0, 1), in nats per dimension: (n,)."""
    last = float(schedule.alphas_bar[-1])
    axes = tuple(range(1, x0.ndim))
    square = np.square(to_device(x0, "cpu").astype(np.float64)).mean(axis=axes)
    return 0.5 * (last * square - last - math.log1p(-last))


def bits_per_dim(
    predict: PredictAt, schedule: Schedule, x0: Array, rng: np.random.Generator, draws: int = 8
) -> tuple[float, float]:
    """Estimate the bound on −log₂ p(x_0) of x0 (n, …) → bits per dimension, and standard error.

    Each draw, two or more, has fresh noise. It takes the term of t = 0, which can be larger than
    all others together, of every sample, and of the rest that of one step a sample: drawn as often
    as it would be large for data of variance 1, and divided by that. It is a density: for images
    with levels a width of w apart, add log₂(1/w).
    """
    n, chances = len(x0), _chances(schedule)
    found = []
    for _ in range(draws):
        nats = bound_terms(predict, schedule, x0, _noise(rng, x0), np.zeros(n, int))
        if len(chances):
            strata = rng.permutation((np.arange(n) + rng.random(n)) / n)
            t = np.searchsorted(np.cumsum(chances)[:-1], strata, side="right")
            nats += bound_terms(predict, schedule, x0, _noise(rng, x0), 1 + t) / chances[t]
        found.append(nats)
    found = (prior_term(schedule, x0) + found) / math.log(2)  # (draws, n)
    # Other noise, and other samples: of their spread, what the noise alone adds is taken away.
    of_noise = found.mean(axis=1).var(ddof=1) / draws
    of_samples = 0.0
    if n > 1:
        spread = found.mean(axis=0).var(ddof=1) - found.var(axis=0, ddof=1).mean() / draws
        of_samples = max(0.0, spread) / n
    return float(found.mean()), math.sqrt(of_noise + of_samples)


def _noise(rng, x0):
    return array_module(x0).asarray(rng.standard_normal(x0.shape, dtype=np.float32))


def _chances(schedule):
    """Return how often each step from 1 on is drawn: mostly by the size of its ideal term."""
    terms = []
    for before, now in pairwise(schedule.alphas_bar.tolist()):
        of_x0, _, variance = posterior(now, before)
        beta = 1 - now / before
        ratio = variance / beta
        terms.append(0.5 * (ratio - 1 - math.log(ratio) + of_x0**2 * (1 - now) / beta))
    terms = np.array(terms)
    return 0.9 * terms / terms.sum() + 0.1 / len(terms) if len(terms) else terms
