"""Muon on a GPU, in a few hundred launches for any number of matrices; a kernel of `nn.optim.muon`.

All rounds of Newton–Schulz multiply polynomials of x xᵀ, a matrix of the shorter side of x. So
matrices with that side in common take them together, whatever the longer side, and x itself is in
the first and the last product alone.
"""

import math
from itertools import groupby
from typing import NamedTuple

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.cpu.flat import Flat, views, with_gradients
from tinyldm.kernels.cuda.adamw import of_gradients, on_device, side_by_side
from tinyldm.kernels.cuda.cublas import product
from tinyldm.kernels.cuda.launch import THREADS, each, each_row, launch
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.nn.optim import ITERATIONS, MOMENTUM, QUINTIC, ema_decay, stretch


def _cost(params, grads, momentum, average, *_, **__):
    names = with_gradients(grads, params, momentum, average)
    return of_gradients(grads) if names and not on_host(params.flat) else NEVER


@kernel("nn.optim.muon", cost=_cost)
def fused_muon(
    params: Flat,
    grads: dict[str, Array],
    momentum: Flat,
    average: Flat,
    step: int,
    size: float,
    scale: float | Array = 1.0,
    ema: float = 0.999,
) -> None:
    """Update the part of the buffers where there are gradients."""
    names = with_gradients(grads, params)
    span = params.span(names)
    g = side_by_side(grads[name] for name in names)
    ahead = array_module(g).empty(g.shape, g.dtype)
    each("momentum", g.size, momentum.flat[span], g, on_device(scale, g), ahead, MOMENTUM)
    matrices = {name: _matrix(params[name], size) for name in names}
    ordered = sorted(names, key=lambda name: (min(matrices[name].shape), matrices[name]))
    parts = views(ahead, {name: matrices[name].shape for name in names})
    x = side_by_side(parts[name] for name in ordered)
    steps = array_module(x).empty(x.shape, x.dtype)
    start = 0
    for side, alike in groupby((matrices[name] for name in ordered), lambda one: min(one.shape)):
        alike = list(alike)
        stop = start + sum(math.prod(one.shape) for one in alike)
        _orthogonalise(x[start:stop], steps[start:stop], side, alike)
        start = stop
    parts = views(steps, {name: matrices[name].shape for name in ordered})
    change = side_by_side(parts[name] for name in names)
    follow = 1 - ema_decay(step, ema)
    each("change_weights", g.size, params.flat[span], average.flat[span], change, follow)


class Matrix(NamedTuple):
    """A matrix, and what its orthogonal step is multiplied by."""

    shape: tuple[int, int]
    factor: float


def _matrix(w, size):
    shape = w.shape if w.ndim == 2 else (w.size // w.shape[-1], w.shape[-1])
    return Matrix(shape, size * stretch(w))


def _orthogonalise(x, out, side, matrices):
    """Do what `nn.optim.orthogonalise` does, for matrices side by side with this shorter side."""
    xp, n = array_module(x), len(matrices)
    squares, norms = xp.empty((n, side, side), x.dtype), xp.empty(n, x.dtype)
    runs, first, start = [], 0, 0
    for (shape, factor), run in groupby(matrices):
        count = len(list(run))
        some = slice(start, start + count * math.prod(shape))
        these, steps = (flat[some].reshape(count, *shape) for flat in (x, out))
        at = slice(first, first + count)
        turned = these.swapaxes(1, 2)
        wide = shape[0] <= shape[1]
        product(*((these, turned) if wide else (turned, these)), squares[at])
        runs.append((wide, these, steps, at, factor))
        first, start = at.stop, some.stop
    launch("normalise_squares", (n,), (THREADS,), squares, norms, side)
    p = every = None
    for _ in range(ITERATIONS):
        squares = squares if p is None else product(product(p, squares), p)
        fourth, p = product(squares, squares), xp.empty(squares.shape, x.dtype)
        each_row("polynomial", n * side, side, squares, fourth, p, *QUINTIC, side)
        every = p if every is None else product(p, every)
    for wide, these, steps, at, factor in runs:
        these_every = every[at]
        numbers = side * side
        each_row("divide", len(these), numbers, these_every, norms[at], factor, numbers)
        product(*((these_every, these) if wide else (these, these_every)), steps)
