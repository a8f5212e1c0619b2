"""Muon on many matrices of one shape at once, on any device; the twin of `nn.optim.muon`."""

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.blocking import BLOCK
from tinyldm.kernels.registry import any_device, kernel
from tinyldm.nn.optim import MOMENTUM, ema_decay, orthogonalise, stretch
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
        steps = orthogonalise(ahead)
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
