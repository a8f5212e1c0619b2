"""Likelihood of data under a diffusion model: the variational bound, in bits per dimension.

Ho et al. 2020, eq. 5, with their larger choice of the reverse variance, β, which is the right one
for data of variance 1, as latents are.
"""

import math
from collections.abc import Callable

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
    predict: PredictAt, schedule: Schedule, x0: Array, rng: np.random.Generator, draws: int = 1
) -> float:
    """Estimate the bound on −log₂ p(x_0), in bits per dimension of x0 (n, …).

    Each draw evaluates every sample at one time step, stratified over the samples, with fresh
    noise. It is a density: for images with levels a width of w apart, add log₂(1/w).
    """
    n, total = len(x0), len(schedule)
    terms = []
    for _ in range(draws):
        strata = (np.arange(n) + rng.random(n)) / n
        t = np.minimum((rng.permutation(strata) * total).astype(int), total - 1)
        noise = array_module(x0).asarray(rng.standard_normal(x0.shape, dtype=np.float32))
        terms.append(bound_terms(predict, schedule, x0, noise, t).mean())
    nats = total * np.mean(terms) + prior_term(schedule, x0).mean()
    return float(nats / math.log(2))
