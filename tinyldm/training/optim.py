"""The optimizer, on plain dicts {name: array}. Updates are made in place, in cache-sized pieces."""

import math

from tinyldm.backend import Array, array_module, cores, map_threads, on_host
from tinyldm.nn.pieces import pieces

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear from 0 to `peak` in `warmup` steps, then half a cosine down to 0 at `total`.

    It depends on the step alone, so a resumed run goes on with the right one.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def global_norm(grads: dict[str, Array]) -> Array:
    """√Σ g² over all gradients: an array without axes that stays on the device."""
    xp = array_module(next(iter(grads.values())))
    return xp.sqrt(sum(xp.dot(g.reshape(-1), g.reshape(-1)) for g in grads.values()))


def clip_factor(norm: Array, limit: float) -> Array:
    """What to multiply gradients of this norm by so that it is at most `limit`."""
    return array_module(norm).minimum(limit / (norm + 1e-12), 1.0)


def adam_state(params: dict[str, Array]) -> dict[str, dict[str, Array]]:
    """The first and second moments of each parameter, at the start: zeros."""
    return {
        moment: {name: array_module(w).zeros_like(w) for name, w in params.items()}
        for moment in ("m", "v")
    }


def adamw(
    params: dict[str, Array],
    grads: dict[str, Array],
    state: dict[str, dict[str, Array]],
    average: dict[str, Array],
    step: int,
    lr: float,
    scale: float | Array = 1.0,
    decay: float = 0.01,
    ema: float = 0.999,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2017, algorithm 2), and of the moving average.

    step: from 0. scale: multiplies the gradients (`clip_factor`). decay: weight decay, of matrices
    and kernels only. `params`, `state` and `average` are changed in place.
    """
    fast = lr / (1 - BETA1 ** (step + 1))
    correction = 1 / math.sqrt(1 - BETA2 ** (step + 1))
    keep = ema_decay(step, ema)

    def update(names):
        for name in names:
            w, m, v, e = params[name], state["m"][name], state["v"][name], average[name]
            xp = array_module(w)
            if not w.flags.c_contiguous:  # its flat form would be a copy
                raise ValueError(f"adamw: {name} is not C-contiguous, it cannot change in place")
            shrink = 1 - lr * decay if w.ndim > 1 else 1.0
            flat = (a.reshape(-1) for a in (w, grads[name], m, v, e))
            for w_, g_, m_, v_, e_ in pieces(*flat):
                g = g_ * scale
                m_ *= BETA1
                m_ += (1 - BETA1) * g
                g *= g
                v_ *= BETA2
                g *= 1 - BETA2
                v_ += g
                denominator = xp.sqrt(v_, out=g)
                denominator *= correction
                denominator += EPSILON
                if shrink != 1:
                    w_ *= shrink
                w_ -= fast * (m_ / denominator)
                e_ += (1 - keep) * (w_ - e_)

    names = sorted(params, key=lambda name: params[name].size)
    shards = cores() if on_host(params[names[0]]) else 1
    map_threads(update, [names[i::shards] for i in range(shards)])


def ema_decay(step: int, limit: float) -> float:
    """min(limit, (1 + n) / (10 + n)) for the n-th update: soon after the start, recent weights."""
    return min(limit, (2 + step) / (11 + step))
