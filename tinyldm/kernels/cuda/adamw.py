"""The optimizer on a GPU: AdamW and the moving average in one launch over flat buffers.

Twins of `nn.optim.adamw` and `nn.optim.global_norm`.
"""

import math

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.cpu.flat import Flat, are_flat
from tinyldm.kernels.cuda.launch import each
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.nn.optim import BETA1, BETA2, EPSILON, ema_decay


def _of_gradients(grads):
    able = all(not on_host(g) and g.dtype == "float32" for g in grads.values())
    return -1.0 if able and grads else NEVER


@kernel("nn.optim.global_norm", cost=_of_gradients)
def fused_global_norm(grads: dict[str, Array]) -> Array:
    """Compute the norm of all gradients as one array."""
    flat = _flat(grads.values())
    return array_module(flat).sqrt((flat * flat).sum())


def _of_flat_buffers(params, grads, state, average, *_, **__):
    flat = are_flat(grads, params, average, *state.values())
    return _of_gradients(grads) if flat and not on_host(params.flat) else NEVER


@kernel("nn.optim.adamw", cost=_of_flat_buffers)
def fused_adamw(
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
    """Update all buffers from the first parameter with a gradient on."""
    # w −= lr m̂ / (√v̂ + ε), with the bias corrections of m̂ and v̂ moved into scalars
    correction = math.sqrt(1 - BETA2 ** (step + 1))
    rate = lr * correction / (1 - BETA1 ** (step + 1))
    start = params.starts[len(params) - len(grads)]
    buffers = (buffer.flat[start:] for buffer in (params, state["m"], state["v"], average))
    g = _flat(grads[name] for name in params.order[len(params) - len(grads) :])
    if isinstance(scale, (int, float)):
        scale = array_module(g).full((), scale, g.dtype)
    numbers = BETA1, BETA2, rate, EPSILON * correction, 1 - lr * decay, 1 - ema_decay(step, ema)
    each("adamw", g.size, *buffers, g, scale, *numbers, np.int64(params.decayed - start))


def _flat(arrays):
    """Copy arrays into one buffer."""
    flat = [x.reshape(-1) for x in arrays]
    return array_module(flat[0]).concatenate(flat)
