"""The diffusion loss, and its weightings over the time steps."""

from collections.abc import Callable

import numpy as np

from tinyldm.backend import Array, array_module
from tinyldm.diffusion.schedule import Schedule, look_up
from tinyldm.nn import functional as F
from tinyldm.nn.protocol import Backward

Weighting = Callable[[Schedule, np.ndarray], np.ndarray]  # of the losses at the steps t (n,)


def diffusion_loss(
    predict: Callable[[Array, Array], tuple[Array, Backward]],
    schedule: Schedule,
    x0: Array,
    noise: Array,
    t: Array,
    weighting: Weighting | None = None,
) -> tuple[Array, Backward]:
    """The simple loss: mean of (prediction − target)² at x_t (Ho et al. 2020, eq. 14).

    On latents, with a text-conditioned `predict`, it is the loss of Rombach et al. 2022, eq. 3.

    predict: `predict(x_t, t) → (prediction, backward)`.
    x0, noise (n, h, w, c); t (n,) integers, on the host or where x0 is.
    weighting: `weighting(schedule, t) → (n,)`, as below; None for equal weights.
    Returns the loss and `backward(grads)`, which passes the gradient on to `predict`.
    """
    xp = array_module(x0)
    prediction, predict_back = predict(schedule.add_noise(x0, noise, t), xp.asarray(t))
    weight = None
    if weighting is not None:
        weight = look_up(weighting(schedule, np.arange(len(schedule))), t, x0)
    loss, loss_back = F.mse(prediction, schedule.target(x0, noise, t), weight)

    def backward(grads):
        dprediction, _ = loss_back()
        return predict_back(dprediction, grads)

    return loss, backward


def min_snr(schedule: Schedule, t: np.ndarray, gamma: float = 5.0) -> np.ndarray:
    """Min-SNR weighting: min(SNR, γ) as the weight of the loss in x_0 (n,).

    Hang et al. 2023, "Efficient diffusion training via min-SNR weighting", section 3.4.
    """
    return np.minimum(schedule.snr(t), gamma) / _per_x0(schedule, t)


def variational(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    """Variational weighting, divided by its mean over all t (n,), for variance β (Ho et al. 2020).

    The weight of the loss in x_0 is ᾱ_{t−1} β / (2 (1 − ᾱ_t)²): 1/(2β) at t = 0, where ᾱ_{t−1} = 1.
    """
    before = np.append(1.0, schedule.alphas_bar[:-1])
    in_x0 = before * schedule.betas / (2 * (1 - schedule.alphas_bar) ** 2)
    every = in_x0 / _per_x0(schedule, np.arange(len(schedule)))
    return (every / every.mean())[t]


def noise_floor(schedule: Schedule, std: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Least expected loss at steps t, for latents with normal noise of their own: (len(t), n).

    std (n, …): its standard deviation, as an encoder predicts it. Even who knows the latents
    without it cannot tell it from the noise that was added: it is left with the posterior variance
    s² σ² / (s² + a² σ²) in x_0.
    """
    variance = np.square(std.reshape(len(std), -1), dtype=np.float64)
    factors = np.broadcast_to(_per_x0(schedule, t), t.shape)
    floors = []
    for alpha_bar, factor in zip(schedule.alphas_bar[t], factors, strict=True):
        error = (1 - alpha_bar) * variance / (1 - alpha_bar + alpha_bar * variance)
        floors.append(factor * error.mean(axis=1))
    return np.stack(floors)


def _per_x0(schedule, t):
    """Return the factor from the loss in x_0 to the loss in the schedule's prediction.

    The loss in ε is SNR times as large as that in x_0, the loss in v SNR + 1 times.
    """
    snr = schedule.snr(t)
    return {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}[schedule.prediction]


WEIGHTINGS = {"simple": None, "min-snr": min_snr, "variational": variational}
