"""Muon: steps of AdamW's length in every direction at once, for the matrices between features.

The gradient of a matrix has a few large singular values, and most of a step goes their way. Muon
moves all singular values of the momentum to about 1 before it steps, so that rare directions are
learnt as fast as common ones (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural
networks"). Tables, vectors, and the first and last layers have no such matrices: see `is_inner`.
"""

import math

from tinyldm.backend import Array, array_module
from tinyldm.nn.optim import ema_decay
from tinyldm.nn.protocol import Params, replaceable

MOMENTUM = 0.95
ITERATIONS = 5
QUINTIC = 3.4445, -4.7750, 2.0315  # Jordan et al.: it lifts small values fast, and ends near 1
# Parts of names: tables, the pooled text, and layers whose inputs or outputs are no features.
OUTER = ("embedding.weight", "add_embedding.", "conv_in.", "conv_out.", "quant_conv.")


def is_inner(name: str, w: Array) -> bool:
    """Return whether a parameter is a matrix or a kernel that maps features to features."""
    return w.ndim > 1 and not any(part in name for part in OUTER)


def orthogonalise(g: Array) -> Array:
    """Move the singular values of matrices (..., m, n) to about 1 (0.7…1.2), by Newton–Schulz.

    Each round is x ← p(x xᵀ) x. With x = U S Vᵀ, x xᵀ is U S² Uᵀ, so the polynomial p acts on the
    singular values alone. QUINTIC is one that, applied a few times, takes all of 0…1 near 1. The
    rounds commute: they are multiplied on the shorter side, and x is in the first and last alone.
    """
    xp = array_module(g)
    wide = g if g.shape[-2] <= g.shape[-1] else g.swapaxes(-1, -2)
    x = wide / (xp.sqrt((wide * wide).sum((-2, -1), keepdims=True)) + 1e-7)
    square = x @ x.swapaxes(-1, -2)  # x xᵀ of each round
    a, b, c = QUINTIC
    every = unit = xp.eye(x.shape[-2], dtype=x.dtype)
    for _ in range(ITERATIONS):
        p = a * unit + b * square + c * (square @ square)
        every, square = p @ every, p @ square @ p
    x = every @ x
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
        matrix = (g + MOMENTUM * m).reshape(matrix_shape(w))  # Nesterov's momentum: a step ahead
        w -= size * stretch(w) * orthogonalise(matrix).reshape(w.shape)
        average[name] += (1 - ema_decay(step, ema)) * (w - average[name])


def matrix_shape(w: Array) -> tuple[int, int]:
    """Return the shape of a weight as a matrix: a kernel is (kh·kw·c_in, c_out)."""
    return w.shape if w.ndim == 2 else (w.size // w.shape[-1], w.shape[-1])


def stretch(w: Array) -> float:
    """Return √(outputs / inputs) of a weight, at least 1."""
    rows, columns = matrix_shape(w)
    outputs, inputs = (rows, columns) if w.ndim == 2 else (columns, rows)
    return math.sqrt(max(1, outputs / inputs))
