"""AdamW, the moving average of the weights, and the learning rate."""

import math

from tinyldm.backend import Array, array_module
from tinyldm.nn.protocol import Params, replaceable

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8  # β₂ = 1 − (1 − β₁)², which saves the kernel a pass
MAX_NORM = 1.0  # of the gradient: longer ones are scaled down to it


DECAYS = {  # name → how much of its peak the learning rate has left at a share of the way, 0…1
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov & Hutter 2016
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate(step: int, total: int, peak: float, warmup: int, decay: str = "cosine") -> float:
    """Learning rate: linear from 0 to `peak` in `warmup` steps, then `decay` to 0 at `total`.

    It depends on the step alone, so a resumed run goes on with the right one.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * DECAYS[decay](min(1.0, progress))


@replaceable
def global_norm(grads: dict[str, Array]) -> Array:
    """Global norm √Σ g² over all gradients: an array without axes that stays on the device."""
    squares = 0.0
    for g in grads.values():
        squares = squares + (g * g).sum()
    return array_module(squares).sqrt(squares)


def clip_factor(norm: Array, limit: float) -> Array:
    """Return the factor that scales gradients of this norm to at most `limit`."""
    return array_module(norm).minimum(limit / (norm + 1e-12), 1.0)


def adam_state(params: Params) -> dict[str, Params]:
    """Return the first and second moments m and v of each parameter, at the start: zeros."""
    return {
        moment: {name: array_module(w).zeros_like(w) for name, w in params.items()}
        for moment in ("m", "v")
    }


@replaceable
def adamw(
    params: Params,
    grads: dict[str, Array],
    state: dict[str, Params],
    average: Params,
    step: int,
    lr: float,
    scale: float | Array = 1.0,
    decay: float = 0.01,
    ema: float = 0.999,
) -> None:
    """Take one step of AdamW (Loshchilov & Hutter 2017, algorithm 2), and of the moving average.

    Parameters without a gradient stay as they are.
    step: from 0. scale: multiplies the gradients (`clip_factor`). decay: weight decay, of matrices
    and kernels only. `params`, `state` and `average` are changed in place.
    """
    for name, g in grads.items():
        w, m, v, g = params[name], state["m"][name], state["v"][name], scale * g
        m[...] = BETA1 * m + (1 - BETA1) * g
        v[...] = BETA2 * v + (1 - BETA2) * g * g
        m_hat, v_hat = m / (1 - BETA1 ** (step + 1)), v / (1 - BETA2 ** (step + 1))
        if w.ndim > 1:
            w *= 1 - lr * decay
        w -= lr * m_hat / (array_module(w).sqrt(v_hat) + EPSILON)
        average[name] += (1 - ema_decay(step, ema)) * (w - average[name])


def ema_decay(step: int, limit: float) -> float:
    """Decay of the average, min(limit, (1 + n) / (10 + n)) with n = step + 1: less at first."""
    return min(limit, (2 + step) / (11 + step))
