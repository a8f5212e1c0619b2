"""Is my sampler right? Is my noise schedule? Checked on data whose perfect denoiser is a formula.

Where the data are normal, N(m, s²), the best prediction of the noise in x_t = a x_0 + b ε is

    E[ε | x_t] = b (x_t − a m) / (a² s² + b²)        with a² = ᾱ_t and b² = 1 − ᾱ_t

and the probability flow keeps (x_t / a − m) / √(s² + b² / a²), so where a sampler without noise
must end is known. With s = 0 the data are one point, and each sampler must reach it.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

MEAN, SPREAD = 0.7, 0.5  # of the data
SMALL = 4e-3 * SPREAD  # an error that the rounding of time steps to integers explains
SLACK = 0.3  # by which the observed order may miss the one that is expected
SAMPLES = 20_000  # of a sampler that draws noise
CLOSE = 0.05  # of their mean and spread, where the steps are many


class SamplerError(AssertionError):
    """A sampler or a schedule is wrong; the message says by which of its properties."""


def check_schedule(alphas_bar: np.ndarray) -> None:
    """Check a noise schedule, ᾱ of each time step: of signal alone at first, of noise at last.

    Raises SamplerError, which names the first time step at which something is wrong.
    """
    alpha_bar = np.asarray(alphas_bar, "float64")
    if alpha_bar.ndim != 1 or len(alpha_bar) < 2:
        raise SamplerError(f"expected ᾱ (steps,), found {alpha_bar.shape}")
    for wrong, what in (
        (~np.isfinite(alpha_bar), "is no finite number"),
        ((alpha_bar < 0) | (alpha_bar > 1), "lies outside of 0…1"),
        (np.append(False, np.diff(alpha_bar) >= 0), "is not smaller than the one before"),
    ):
        if wrong.any():
            t = int(wrong.argmax())
            raise SamplerError(f"ᾱ at time step {t}, {alpha_bar[t]:g}, {what}")
    if alpha_bar[0] < 0.9:
        raise SamplerError(f"ᾱ at the first time step is {alpha_bar[0]:g}: too much noise, < 0.9")
    if alpha_bar[-1] > 0.05:
        raise SamplerError(
            f"ᾱ at the last time step is {alpha_bar[-1]:g}, > 0.05: generation begins with noise "
            "alone, which the network has then never seen"
        )


def check_sampler(
    sample: Callable,
    alphas_bar: np.ndarray,
    *,
    order: int | None = 1,
    steps: tuple[int, ...] = (40, 80, 160),
    rng: int | Generator = 0,
) -> float:
    """Check a sampler of diffusion models on normal data, where the right result is known.

    sample: `sample(predict, x, steps) → x_0`, with `predict(x_t, t) → the noise in x_t`, at time
        steps t that may lie between two of the schedule.
    order: of a sampler without noise: its error falls with steps^−order. None: it draws noise, so
        the mean and the spread of many samples are checked.

    Returns the order that was observed, or the error of the spread. Raises SamplerError.
    """
    rng = np.random.default_rng(rng)
    _check_point(sample, alphas_bar, rng, steps)
    if order is None:
        return _check_spread(sample, alphas_bar, rng, steps[-1])
    errors = [_error(sample, alphas_bar, count) for count in steps]
    if not np.isfinite(errors).all():
        raise SamplerError(f"in {steps} steps the result is no finite number")
    if errors[-1] < 1e-10:
        return math.inf
    found = math.log(errors[-2] / errors[-1]) / math.log(steps[-1] / steps[-2])
    if found < order - SLACK and errors[-1] > SMALL:
        listed = ", ".join(
            f"{error:.2g} in {count}" for error, count in zip(errors, steps, strict=True)
        )
        raise SamplerError(
            f"the error falls with steps^−{found:.2f}, expected order {order}: {listed} steps"
        )
    return found


class _Perfect:
    """The perfect prediction of noise, for data N(mean, spread²); it keeps its first call."""

    def __init__(self, alphas_bar, spread):
        sigmas = np.sqrt(1 / np.maximum(np.asarray(alphas_bar, "float64"), 1e-12) - 1)
        self.logs, self.spread, self.first = np.log(np.maximum(sigmas, 1e-12)), spread, None

    def sigma(self, t):
        return math.exp(np.interp(float(t), np.arange(len(self.logs)), self.logs))

    def __call__(self, x, t):
        t = float(np.mean(t))
        if self.first is None:
            self.first = np.array(x, "float64"), t
        alpha_bar = 1 / (1 + self.sigma(t) ** 2)
        a, b = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        return b * (x - a * MEAN) / (a**2 * self.spread**2 + b**2)


def _check_point(sample, alphas_bar, rng, steps):
    x = rng.normal(size=64)
    least = math.sqrt(1 / alphas_bar[0] - 1)  # the noise that may stay
    for count in (*steps[:1], steps[-1]):
        found = np.asarray(sample(_Perfect(alphas_bar, 0.0), x, count))
        error = abs(found - MEAN).max()
        if not error <= 4 * least + 1e-6:
            raise SamplerError(
                f"data that are one point, {MEAN}, are not reached in {count} steps: the result is "
                f"{found[abs(found - MEAN).argmax()]:.6g}, off by {error:.2g}"
            )


def _error(sample, alphas_bar, count):
    """Return the largest error of a sampler without noise, from three points."""
    predict = _Perfect(alphas_bar, SPREAD)
    found = np.asarray(sample(predict, np.array([-1.0, 0.5, 2.0]), count))
    x, t = predict.first  # where it really began: some samplers scale x, or begin later
    sigma = predict.sigma(t)
    constant = (x * math.sqrt(1 + sigma**2) - MEAN) / math.sqrt(SPREAD**2 + sigma**2)
    return abs(found - (MEAN + constant * SPREAD)).max()


def _check_spread(sample, alphas_bar, rng, count):
    found = np.asarray(sample(_Perfect(alphas_bar, SPREAD), rng.normal(size=SAMPLES), count))
    mean, spread = found.mean(), found.std()
    if abs(mean - MEAN) > CLOSE or abs(spread - SPREAD) > CLOSE:
        raise SamplerError(
            f"of data with mean {MEAN} and spread {SPREAD}, the samples of {count} steps have mean "
            f"{mean:.3f} and spread {spread:.3f}"
        )
    return float(abs(spread - SPREAD))
