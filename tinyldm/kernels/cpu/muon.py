"""Muon on all matrices of a shape at once, the shapes on all cores; the twin of `nn.optim.muon`."""

import numpy as np

from tinyldm.backend import Array, on_host
from tinyldm.kernels.blocking import BLOCK
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.nn.optim import MOMENTUM, ema_decay, orthogonalise, stretch
from tinyldm.nn.protocol import Params
from tinyldm.threads import map_threads


def _on_host(params, grads, *_, **__):
    return 0.0 if all(map(on_host, grads.values())) else NEVER


@kernel("nn.optim.muon", cost=_on_host)
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
    """Orthogonalise matrices of one shape as one array: fewer, larger operations."""
    alike = {}
    for name in grads:
        alike.setdefault(params[name].shape, []).append(name)
    rest = 1 - ema_decay(step, ema)

    def update(names):
        first = params[names[0]]
        shape = first.shape if first.ndim == 2 else (-1, first.shape[-1])
        ahead = np.empty((len(names), *first.reshape(shape).shape), first.dtype)
        for name, matrix in zip(names, ahead, strict=True):
            g, m = grads[name].reshape(shape), momentum[name].reshape(shape)
            np.multiply(g, (1 - MOMENTUM) * scale, out=matrix)
            m *= MOMENTUM
            m += matrix
            matrix += MOMENTUM * m
        steps = orthogonalise(ahead)
        steps *= size * stretch(first)
        for name, change in zip(names, steps, strict=True):
            w, mean = params[name], average[name]
            w -= change.reshape(w.shape)
            mean += rest * (w - mean)

    work = []
    for names in alike.values():
        some = max(1, BLOCK // params[names[0]].size)  # that stay in the cache together
        work += [names[i : i + some] for i in range(0, len(names), some)]
    map_threads(update, work)
