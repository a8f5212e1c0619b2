"""The optimizer on a GPU: AdamW and the moving average in one launch over flat buffers.

Twins of `nn.optim.adamw` and `nn.optim.global_norm`.
"""

from collections.abc import Iterable

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.cpu.adamw import bias_corrected
from tinyldm.kernels.cpu.flat import Flat, with_gradients
from tinyldm.kernels.cuda.launch import each
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.nn.optim import BETA1, BETA2, ema_decay


def of_gradients(grads: dict[str, Array]) -> float:
    """Return the cost of a kernel for these gradients: less than that of any other on a GPU."""
    able = all(not on_host(g) and g.dtype == "float32" for g in grads.values())
    return -1.0 if able and grads else NEVER


@kernel("nn.optim.global_norm", cost=of_gradients)
def fused_global_norm(grads: dict[str, Array]) -> Array:
    """Compute the norm of all gradients as one array."""
    flat = side_by_side(grads.values())
    return array_module(flat).sqrt((flat * flat).sum())


def _of_flat_buffers(params, grads, state, average, *_, **__):
    names = with_gradients(grads, params, average, *state.values())
    return of_gradients(grads) if names and not on_host(params.flat) else NEVER


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
    """Update the part of all buffers where there are gradients."""
    names = with_gradients(grads, params)
    span = params.span(names)
    buffers = (buffer.flat[span] for buffer in (params, state["m"], state["v"], average))
    g = side_by_side(grads[name] for name in names)
    rates = bias_corrected(step, lr)
    numbers = BETA1, BETA2, *rates, 1 - lr * decay, 1 - ema_decay(step, ema)
    decayed = np.int64(params.decayed - span.start)
    each("adamw", g.size, *buffers, g, on_device(scale, g), *numbers, decayed)


def side_by_side(arrays: Iterable[Array]) -> Array:
    """Copy arrays into one buffer, one after the other."""
    flat = [x.reshape(-1) for x in arrays]
    return array_module(flat[0]).concatenate(flat)


def on_device(scale: float | Array, like: Array) -> Array:
    """Return a factor of gradients as an array on the device of `like`."""
    if isinstance(scale, (int, float)):
        return array_module(like).full((), scale, like.dtype)
    return scale
