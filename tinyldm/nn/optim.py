"""The optimizers AdamW and Muon, the moving average of the weights, and the learning rate.

AdamW treats a matrix as a list of numbers. The gradient of a matrix has a few large singular
values, and they decide most of AdamW's step. Muon moves all singular values of the momentum to
about 1 before it steps. So rare directions are learnt as fast as common ones (Jordan et al. 2024,
"Muon: an optimizer for hidden layers in neural networks"). It is for the matrices between features.
"""

import math

from tinyldm.backend import Array, array_module
from tinyldm.nn.protocol import Params, replaceable

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8  # β₂ = 1 − (1 − β₁)², which saves the kernel a pass
MAX_NORM = 1.0  # of the gradient: longer ones are scaled down to it
MOMENTUM = 0.95  # of Muon
ITERATIONS = 5
QUINTIC = 3.4445, -4.7750, 2.0315  # Jordan et al.: it lifts small values fast, and ends near 1
# Parts of names: tables, the pooled text, and layers whose inputs or outputs are no features.
OUTER = ("embedding.weight", "add_embedding.", "conv_in.", "conv_out.", "quant_conv.")


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


def is_inner(name: str, w: Array) -> bool:
    """Return whether a parameter is a matrix or a kernel that maps features to features."""
    return w.ndim > 1 and not any(part in name for part in OUTER)


def orthogonalise(g: Array) -> Array:
    """Move the singular values of matrices (..., m, n) to about 1 (0.7…1.2), by Newton–Schulz.

    Each round is x ← p(x xᵀ) x. With x = U S Vᵀ, x xᵀ is U S² Uᵀ, so the polynomial p acts on the
    singular values alone. QUINTIC is one that, applied a few times, takes all of 0…1 near 1.
    """
    xp = array_module(g)
    wide = g if g.shape[-2] <= g.shape[-1] else g.swapaxes(-1, -2)
    x = wide / (xp.sqrt((wide * wide).sum((-2, -1), keepdims=True)) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = x @ x.swapaxes(-1, -2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x if wide is g else x.swapaxes(-1, -2)


@replaceable
def muon(
    params: Params,
    grads: Params,
    momentum: Params,
    average: Params,
    step: int,
    size: float,
    scale: float | Array = 1.0,
    ema: float = 0.999,
) -> None:
    """Take one step of Muon for the parameters that have gradients, and of the moving average.

    step: from 0. size: the spectral norm of a step, times √(outputs / inputs) where there are more
    outputs (Bernstein 2025). scale: multiplies the gradients (`clip_factor`). `params`, `momentum`
    and `average` are changed in place.
    """
    for name, g in grads.items():
        w, m = params[name], momentum[name]
        g = (1 - MOMENTUM) * scale * g
        m[...] = MOMENTUM * m + g
        ahead = g + MOMENTUM * m  # Nesterov's momentum
        matrix = ahead if w.ndim == 2 else ahead.reshape(-1, w.shape[-1])
        w -= size * stretch(w) * orthogonalise(matrix).reshape(w.shape)
        average[name] += (1 - ema_decay(step, ema)) * (w - average[name])


def stretch(w: Array) -> float:
    """Return √(outputs / inputs) of a weight (outputs, inputs) or (kh, kw, c_in, c_out), or 1."""
    outputs = w.shape[0] if w.ndim == 2 else w.shape[-1]
    return math.sqrt(max(1, outputs * outputs / w.size))


def ema_decay(step: int, limit: float) -> float:
    """Decay of the average, min(limit, (1 + n) / (10 + n)) with n = step + 1: less at first."""
    return min(limit, (2 + step) / (11 + step))
