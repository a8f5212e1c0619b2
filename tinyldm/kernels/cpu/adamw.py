"""The optimizer on flat buffers, in blocks that stay in the cache for all operations of a step.

Twins of `nn.optim.adamw` and `nn.optim.global_norm`.
"""

import math

import numpy as np

from tinyldm.backend import Array, on_host
from tinyldm.kernels.cpu.flat import Flat, with_gradients
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.kernels.workspace import scratch
from tinyldm.nn.optim import BETA1, BETA2, EPSILON, ema_decay
from tinyldm.threads import cores, map_threads

BLOCK = 2**18  # elements of each buffer at a time: few calls, and most of them find it in the cache


def _of_host_arrays(grads):
    return 0.0 if all(map(on_host, grads.values())) else NEVER


@kernel("nn.optim.global_norm", cost=_of_host_arrays)
def global_norm(grads: dict[str, Array]) -> Array:
    """Compute the norm with the gradients shared between the cores, about equally."""
    names = sorted(grads, key=lambda name: grads[name].size)

    def squares(part):
        flat = (grads[name].reshape(-1) for name in part)
        return sum(np.dot(g, g) for g in flat)

    shares = min(len(names), cores())
    return np.sqrt(sum(map_threads(squares, [names[i::shares] for i in range(shares)])))


def bias_corrected(step: int, lr: float) -> tuple[float, float]:
    """Return `rate` and `small` for w −= rate m / (√v + small).

    It is w −= lr m̂ / (√v̂ + ε), with the bias corrections of m̂ and v̂ moved into these scalars.
    """
    correction = math.sqrt(1 - BETA2 ** (step + 1))
    return lr * correction / (1 - BETA1 ** (step + 1)), EPSILON * correction


def _of_flat_buffers(params, grads, state, average, *_, **__):
    names = with_gradients(grads, params, average, *state.values())
    return 0.0 if names and on_host(params.flat) else NEVER


@kernel("nn.optim.adamw", cost=_of_flat_buffers)
def adamw(
    params: Flat,
    grads: dict[str, Array],
    state: dict[str, Flat],
    average: Flat,
    step: int,
    lr: float,
    scale: float | Array = 1.0,
    decay: float = 0.01,
    ema: float = 0.999,
) -> None:
    """Update one block of every buffer at a time, the blocks shared between the cores."""
    rate, small = bias_corrected(step, lr)
    keep = ema_decay(step, ema)
    g_scale = scale * (1 - BETA1)
    span = params.span(with_gradients(grads, params))

    def update(start):
        stop = min(start + BLOCK, span.stop)
        w, m, v, e = (a.flat[start:stop] for a in (params, state["m"], state["v"], average))
        g, other = scratch(w, stop - start, stop - start)
        for name, inside, here in params.parts(start, stop):
            np.multiply(grads[name].reshape(-1)[inside], g_scale, out=g[here])
        m *= BETA1
        m += g
        g *= g  # ((1 − β₁) g)² is (1 − β₂) g², by the choice of the betas
        v *= BETA2
        v += g
        np.sqrt(v, out=g)
        g += small
        np.divide(m, g, out=g)
        g *= rate
        if start < params.decayed:
            w[: params.decayed - start] *= 1 - lr * decay
        w -= g
        np.subtract(w, e, out=other)
        other *= 1 - keep
        e += other

    def update_share(i):
        for start in range(span.start + i * BLOCK, span.stop, shares * BLOCK):
            update(start)

    shares = cores()
    map_threads(update_share, range(shares))
