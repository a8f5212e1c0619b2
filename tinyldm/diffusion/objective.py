"""What the denoiser is trained on."""

from collections.abc import Callable

import numpy as np

from tinyldm.backend import Array, array_module
from tinyldm.diffusion.schedule import Schedule
from tinyldm.nn import functional as F
from tinyldm.nn.protocol import Backward


def diffusion_loss(
    predict: Callable[[Array, Array], tuple[Array, Backward]],
    schedule: Schedule,
    x0: Array,
    noise: Array,
    t: np.ndarray,
    min_snr: float | None = None,
) -> tuple[Array, Backward]:
    """The simple loss: mean of (prediction − target)² at x_t (Ho et al. 2020, eq. 14).

    With latents as x_0 and a `predict` that sees text it is that of Rombach et al. 2022, eq. 3.

    predict: `predict(x_t, t) → (prediction, backward)`.
    x0, noise (n, h, w, c); t (n,) whole numbers on the host.
    min_snr: the γ of `min_snr_weight`, or None for equal weights.
    Returns the loss and `backward(grads)`, which passes the gradient on to `predict`.
    """
    xp = array_module(x0)
    prediction, predict_back = predict(schedule.add_noise(x0, noise, t), xp.asarray(t))
    weight = None
    if min_snr is not None:
        weight = min_snr_weight(schedule.snr(t), schedule.prediction, min_snr)
        weight = xp.asarray(weight.astype(x0.dtype))
    loss, loss_back = F.mse(prediction, schedule.target(x0, noise, t), weight)

    def backward(grads):
        dprediction, _ = loss_back()
        return predict_back(dprediction, grads)

    return loss, backward


def min_snr_weight(snr: np.ndarray, prediction: str, gamma: float) -> np.ndarray:
    """min(SNR, γ) as a weight of the loss in x_0, expressed for each prediction (n,).

    Hang et al. 2023, "Efficient diffusion training via min-SNR weighting", section 3.4: the loss in
    ε is SNR times, the loss in v is SNR + 1 times the loss in x_0.
    """
    per_x0 = {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}[prediction]
    return np.minimum(snr, gamma) / per_x0
