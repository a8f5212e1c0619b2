"""The optimizer. Weights, moments and averages lie in one buffer each, as a `Flat`.

A network has hundreds of small arrays; one by one, most of a step would go into calls. The buffers
are worked through in pieces that stay in the cache for all the operations of a step.
"""

import bisect
import math

import numpy as np

from tinyldm import team
from tinyldm.backend import Array, array_module, cores, map_threads, on_host
from tinyldm.nn.pieces import empty, scratch

BETA1, EPSILON = 0.9, 1e-8
BETA2 = 1 - (1 - BETA1) ** 2  # 0.99, so that ((1 − β₁) g)² is (1 − β₂) g²: a pass less
PIECE = 2**18  # numbers of each buffer at a time: few calls, and most of them find it in the cache


DECAYS = {  # name → how much of its peak the learning rate has left at a share of the way, 0…1
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov & Hutter 2016
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate(step: int, total: int, peak: float, warmup: int, decay: str = "cosine") -> float:
    """Linear from 0 to `peak` in `warmup` steps, then half a cosine or a line to 0 at `total`.

    It depends on the step alone, so a resumed run goes on with the right one.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * DECAYS[decay](min(1.0, progress))


def global_norm(grads: dict[str, Array]) -> Array:
    """√Σ g² over all gradients: an array without axes that stays on the device."""
    names = sorted(grads, key=lambda name: grads[name].size)
    xp = array_module(grads[names[0]])

    def squares(part):
        flat = (grads[name].reshape(-1) for name in part)
        return sum(xp.dot(g, g) for g in flat)

    shares = min(len(names), cores() if on_host(grads[names[0]]) else 1)
    return xp.sqrt(sum(map_threads(squares, [names[i::shares] for i in range(shares)])))


def clip_factor(norm: Array, limit: float) -> Array:
    """What to multiply gradients of this norm by so that it is at most `limit`."""
    return array_module(norm).minimum(limit / (norm + 1e-12), 1.0)


class Flat(dict):
    """{name: array} whose arrays are views of one buffer, `flat`: a copy of those it is made of.

    In the buffer matrices and kernels come first, `decayed` numbers: only they are to decay.
    `shared`: on the CPU, processes that are copied from this one read and write the same numbers.
    """

    def __init__(self, named: dict[str, Array], shared: bool = False):
        order = sorted(named, key=lambda name: named[name].ndim <= 1)
        sizes = [named[name].size for name in order]
        self.order, self.starts = order, np.cumsum([0, *sizes]).tolist()
        self.decayed = sum(named[name].size for name in order if named[name].ndim > 1)
        self.flat = empty((self.starts[-1],), *named.values())
        self.shared = shared and on_host(self.flat)
        if self.shared:
            self.flat = team.shared(self.flat.size, self.flat.dtype)
        spans = {name: slice(*self.starts[i : i + 2]) for i, name in enumerate(order)}
        super().__init__({n: self.flat[spans[n]].reshape(w.shape) for n, w in named.items()})
        for name, w in named.items():
            self[name][...] = w

    def copy(self) -> "Flat":
        """The same numbers in another buffer."""
        return Flat(self)

    def parts(self, start: int, stop: int) -> list[tuple[str, slice, slice]]:
        """What lies in start…stop of the buffer: (name, where in that array, where from start)."""
        found = []
        i = bisect.bisect_right(self.starts, start) - 1
        while i < len(self.order) and self.starts[i] < stop:
            begin, end = max(start, self.starts[i]), min(stop, self.starts[i + 1])
            inside = slice(begin - self.starts[i], end - self.starts[i])
            found.append((self.order[i], inside, slice(begin - start, end - start)))
            i += 1
        return found


def adam_state(params: Flat) -> dict[str, Flat]:
    """The first and second moments of each parameter, at the start: zeros."""
    state = {"m": params.copy(), "v": params.copy()}
    for moment in state.values():
        moment.flat[...] = 0
    return state


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
    """One step of AdamW (Loshchilov & Hutter 2017, algorithm 2), and of the moving average.

    step: from 0. scale: multiplies the gradients (`clip_factor`). decay: weight decay, of matrices
    and kernels only. `params`, `state` and `average` are changed in place.
    """
    # w −= lr m̂ / (√v̂ + ε), with what corrects m̂ and v̂ moved out of the arrays
    correction = math.sqrt(1 - BETA2 ** (step + 1))
    rate = lr * correction / (1 - BETA1 ** (step + 1))
    small = EPSILON * correction
    keep = ema_decay(step, ema)
    g_scale = scale * (1 - BETA1)
    size = len(params.flat)
    piece = PIECE if on_host(params.flat) else max(1, size)

    def update(start):
        stop = min(start + piece, size)
        w, m, v, e = (a.flat[start:stop] for a in (params, state["m"], state["v"], average))
        xp = array_module(w)
        g, other = scratch(w, stop - start, stop - start)
        for name, inside, here in params.parts(start, stop):
            xp.multiply(grads[name].reshape(-1)[inside], g_scale, out=g[here])
        m *= BETA1
        m += g
        g *= g
        v *= BETA2
        v += g
        xp.sqrt(v, out=g)
        g += small
        xp.divide(m, g, out=g)
        g *= rate
        if start < params.decayed:
            w[: params.decayed - start] *= 1 - lr * decay
        w -= g
        xp.subtract(w, e, out=other)
        other *= 1 - keep
        e += other

    def update_share(i):
        for start in range(i * piece, size, shares * piece):
            update(start)

    shares = cores() if on_host(params.flat) else 1
    map_threads(update_share, range(shares))


def ema_decay(step: int, limit: float) -> float:
    """min(limit, (1 + n) / (10 + n)) for the n-th update: soon after the start, recent weights."""
    return min(limit, (2 + step) / (11 + step))
