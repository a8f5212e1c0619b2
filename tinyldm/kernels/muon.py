"""Muon on many matrices of one shape at once, on any device; the twin of `nn.optim.muon`.

The rounds of Newton–Schulz commute: all of them are functions of x xᵀ. So they are multiplied on
the shorter side of x, and x itself is in the first and the last product alone.
"""

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.blocking import BLOCK
from tinyldm.kernels.registry import any_device, kernel
from tinyldm.nn.optim import ITERATIONS, MOMENTUM, QUINTIC, ema_decay, stretch
from tinyldm.nn.protocol import Params
from tinyldm.threads import map_threads


@kernel("nn.optim.muon", cost=any_device)
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
    """Orthogonalise matrices of one shape as one array, on all cores: fewer, larger operations."""
    alike = {}
    for name in grads:
        alike.setdefault(params[name].shape, []).append(name)
    rest = 1 - ema_decay(step, ema)

    def update(names):
        first = params[names[0]]
        shape = first.shape if first.ndim == 2 else (first.size // first.shape[-1], first.shape[-1])
        xp = array_module(first)
        ahead = xp.empty((len(names), *shape), first.dtype)
        for name, matrix in zip(names, ahead, strict=True):
            g, m = grads[name].reshape(shape), momentum[name].reshape(shape)
            xp.multiply(g, (1 - MOMENTUM) * scale, out=matrix)
            m *= MOMENTUM
            m += matrix
            matrix += MOMENTUM * m
        steps = _orthogonalise(ahead)
        steps *= size * stretch(first)
        for name, change in zip(names, steps, strict=True):
            w, mean = params[name], average[name]
            w -= change.reshape(w.shape)
            mean += rest * (w - mean)

    host = all(map(on_host, grads.values()))
    work = []
    for names in alike.values():
        some = max(1, BLOCK // params[names[0]].size) if host else len(names)  # that fit the cache
        work += [names[i : i + some] for i in range(0, len(names), some)]
    map_threads(update, work) if host else list(map(update, work))


def _orthogonalise(g):
    """Do what `nn.optim.orthogonalise` does, for matrices (count, m, n)."""
    xp = array_module(g)
    x = g if g.shape[1] <= g.shape[2] else g.swapaxes(1, 2)
    norm = xp.sqrt((g * g).sum((1, 2), keepdims=True)) + 1e-7
    square = x @ x.swapaxes(1, 2)
    square /= norm * norm
    every = p = _polynomial(square)
    for _ in range(ITERATIONS - 1):
        square = p @ square @ p
        p = _polynomial(square)
        every = p @ every
    x = (every / norm) @ x
    return x if x.shape == g.shape else x.swapaxes(1, 2)


def _polynomial(square):
    """Compute a I + b S + c S² for matrices S (count, m, m)."""
    a, b, c = QUINTIC
    p = square @ square
    p *= c
    p += b * square
    diagonal = p.reshape(len(p), -1)[:, :: p.shape[1] + 1]  # a view
    diagonal += a
    return p
