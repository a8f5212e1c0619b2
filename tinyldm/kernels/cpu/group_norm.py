"""Group norm, alone and with SiLU, in blocks that fit the cache; twins of `nn.norms`.

A sample too large for the cache is cut, and each of its two passes runs over all its parts.
"""

import functools
from functools import reduce
from operator import add

import numpy as np

from tinyldm.backend import Array
from tinyldm.kernels.blocking import on_free_cores, repeated, row_blocks, whole_rows, wide_rows
from tinyldm.kernels.cpu.activations import one_plus_tanh
from tinyldm.kernels.registry import kernel
from tinyldm.kernels.workspace import empty, scratch_like
from tinyldm.nn.protocol import Backward


@kernel("nn.norms.group_norm")
def group_norm(x: Array, w: Array, b: Array, groups: int, eps: float) -> tuple[Array, Backward]:
    """Normalise in two passes over each sample, first for the moments and then for the result."""
    return _group_norm(x, w, b, groups, eps, silu=False)


@kernel("nn.norms.group_norm_silu")
def group_norm_silu(
    x: Array, w: Array, b: Array, groups: int, eps: float
) -> tuple[Array, Backward]:
    """Normalise, and activate while the data are in the cache; backward recomputes SiLU's input."""
    return _group_norm(x, w, b, groups, eps, silu=True)


def _group_norm(x, w, b, groups, eps, silu):
    n, c = len(x), x.shape[-1]
    x3 = wide_rows(x.reshape(n, -1, c))
    y = empty(x3.shape, x, w)
    positions = x.size // (n * c)
    group_means = _group_means(c, groups, y.dtype.char)
    # Far from zero E[x²] − E[x]² cancels, and the rounding of a mean shows in y. So the moments are
    # those of x − guess: the mean of every eighth row, off by √8 standard deviations at most.
    # Per sample and channel: what to subtract, what to multiply by.
    some = x3[:, ::8]
    mean = group_means(_sums(c, some[0].size // c, some))
    rstd = np.empty_like(mean)
    half = 0.5 if silu else 1  # z σ(z) = h (1 + tanh h) for h = z / 2
    w_half, b_half = half * w, half * b
    samples, cut = row_blocks(x3)

    def forward(ns):
        x_, y_, mean_ = x3[ns], y[ns], mean[ns]
        guess = repeated(mean_, x_)

        def moments(ps):
            centred = y_[:, ps]
            (square,) = scratch_like(centred)
            np.subtract(x_[:, ps], guess, out=centred)
            np.multiply(centred, centred, out=square)
            return _sums(c, positions, centred, square)

        rest, variance = group_means(reduce(add, on_free_cores(moments, cut, x_.size, x)))
        mean_ += rest
        variance -= rest * rest
        variance += eps
        rstd_ = np.sqrt(variance, out=rstd[ns])
        np.divide(1, rstd_, out=rstd_)
        scale = rstd_ * w_half
        rest *= scale
        scale, shift = repeated(scale, x_), repeated(b_half - rest, x_)

        def normalise(ps):
            h = y_[:, ps]
            h *= scale
            h += shift
            if silu:
                (gate,) = scratch_like(h)
                one_plus_tanh(h, out=gate)
                h *= gate

        on_free_cores(normalise, cut, x_.size, x)

    with whole_rows(x3.shape[2]):
        on_free_cores(forward, samples, x.size, x)

    def backward(dy, weights=True):
        dy3 = dy.reshape(x3.shape)
        dx = empty(x3.shape, dy, w)
        shift = repeated(b_half, x3)

        def part(ns):
            x_, dy_, dx_, rstd_ = x3[ns], dy3[ns], dx[ns], rstd[ns]
            mean_, scale = repeated(mean[ns], x_), repeated(rstd_ * w_half, x_)

            def moments(ps):
                dz = dy_[:, ps]
                centred, h, slope = scratch_like(dz, 3)
                np.subtract(x_[:, ps], mean_, out=centred)
                if silu:  # dz = ½ g (1 + h (2 − g)) dy, g = 1 + tanh h
                    dz = dx_[:, ps]
                    np.multiply(centred, scale, out=h)
                    h += shift
                    one_plus_tanh(h, out=dz)
                    np.subtract(2, dz, out=slope)
                    slope *= h
                    slope += 1
                    dz *= slope
                    dz *= dy_[:, ps]
                np.multiply(dz, centred, out=h)
                return _sums(c, positions, h, dz)

            # dx = rstd · (w dz − mean(w dz) − normal · mean(w dz · normal)), means over a group,
            # for normal = rstd · centred
            means = half * reduce(add, on_free_cores(moments, cut, x_.size, x))
            means[0] *= rstd_
            along, across = group_means(means * w) * rstd_
            along, across = repeated(along * rstd_, x_), repeated(across, x_)

            def spread_out(ps):
                dz, centred = (dx_ if silu else dy_)[:, ps], scratch_like(dx_[:, ps])[0]
                np.subtract(x_[:, ps], mean_, out=centred)
                centred *= along
                centred += across
                dz = np.multiply(dz, scale, out=dx_[:, ps])
                dz -= centred

            on_free_cores(spread_out, cut, x_.size, x)
            return means.sum(axis=(1, 2))

        with whole_rows(x3.shape[2]):
            dw, db = reduce(add, on_free_cores(part, samples, x.size, x)) * positions
        return dx.reshape(x.shape), *((dw, db) if weights else (None, None))

    return y.reshape(x.shape), backward


def _sums(c, divisor, *arrays):
    """Sum over positions and divide, (n, ...) → (n, 1, c), as a product: faster than `sum` here.

    The sums of several arrays come in one, as (number of arrays, n, 1, c).
    """
    arrays = [x.reshape(len(x), -1, c) for x in arrays]
    n, p, c = arrays[0].shape
    weights = _equal_weights(p, divisor, arrays[0].dtype.char)
    if len(arrays) == 1:
        return weights @ arrays[0]
    sums = np.empty((len(arrays), n, 1, c), arrays[0].dtype)
    for x, out in zip(arrays, sums, strict=True):
        np.matmul(weights, x, out=out)
    return sums


@functools.cache
def _equal_weights(p, divisor, dtype):
    return np.full((1, p), 1 / divisor, dtype)


@functools.cache
def _group_means(c, groups, dtype):
    """Return a function that replaces each channel (..., c) by the mean of its group."""
    size = c // groups
    members = (np.arange(groups)[:, None] == np.arange(c) // size).astype(dtype)  # (groups, c)
    weights = members.T * (1 / size)
    return lambda x: (x.reshape(-1, c) @ weights @ members).reshape(x.shape)
