"""The normalisations: numbers moved to mean 0 and standard deviation 1, then scaled and shifted.

As in `functional`, each works in float32, float64 and complex128, and gives its backward pass too.
Group norm goes over its input in two rounds, first for the moments and then for the result. Where a
sample is so large that it must be cut, each round is over all its parts.
"""

import functools
from functools import reduce
from operator import add

from tinyldm.backend import Array, array_module
from tinyldm.nn.pieces import as_rows, each_piece, empty, on_free_cores, runs, scratch
from tinyldm.nn.protocol import Backward, differentiable


@differentiable
def group_norm(
    x: Array, w: Array, b: Array, groups: int, eps: float, silu: bool = False
) -> tuple[Array, Backward]:
    """Normalise each group of channels over a picture, scale, shift; x (n, ..., c), w and b (c,).

    y = w (x − mean) / √(variance + eps) + b (Wu & He 2018, section 3). With `silu` the activation
    that follows is applied while the data are in the cache, and its input is made again in the
    backward pass instead of being kept.
    """
    xp = array_module(x)
    c = x.shape[-1]
    x3 = x.reshape(len(x), -1, c)
    y = empty(x3.shape, x, w)
    positions = x3.shape[1]
    group_means = _group_means(xp, c, groups, y.dtype.char)
    # Far from zero E[x²] − E[x]² cancels, and the rounding of a mean shows in y. So the moments are
    # those of x − guess: the mean of every eighth position, off by √8 standard deviations at most.
    # Per sample and channel: what to subtract, what to multiply by.
    mean = group_means(_sums(x3[:, ::8], -(-positions // 8)))
    rstd = xp.empty_like(mean)
    half = 0.5 if silu else 1  # z σ(z) = h (1 + tanh h) for h = z / 2
    w_half, b_half = half * w, half * b
    samples, cut = runs(x3)

    def forward(ns):
        x_, y_, mean_ = x3[ns], y[ns], mean[ns]

        def moments(ps):
            centred = y_[:, ps]
            (square,) = _scratch_like(centred)
            xp.subtract(x_[:, ps], mean_, out=centred)
            xp.multiply(centred, centred, out=square)
            return _sums(centred, square, positions)

        rest, variance = group_means(reduce(add, on_free_cores(moments, cut, x_.size, x)))
        mean_ += rest
        variance -= rest * rest
        variance += eps
        rstd_ = xp.sqrt(variance, out=rstd[ns])
        xp.divide(1, rstd_, out=rstd_)
        scale = rstd_ * w_half
        rest *= scale
        shift = b_half - rest

        def normalise(ps):
            h = y_[:, ps]
            h *= scale
            h += shift
            if silu:
                (gate,) = _scratch_like(h)
                xp.tanh(h, out=gate)
                gate += 1
                h *= gate

        on_free_cores(normalise, cut, x_.size, x)

    on_free_cores(forward, samples, x.size, x)

    def backward(dy, weights=True):
        dy3 = dy.reshape(x3.shape)
        dx = empty(x3.shape, dy, w)

        def part(ns):
            x_, dy_, dx_, mean_, rstd_ = x3[ns], dy3[ns], dx[ns], mean[ns], rstd[ns]
            scale = rstd_ * w_half

            def moments(ps):
                dz = dy_[:, ps]
                centred, h, slope = _scratch_like(dz, 3)
                xp.subtract(x_[:, ps], mean_, out=centred)
                if silu:  # dz = ½ (1 + t) (1 + h (1 − t)) dy, t = tanh h
                    dz = dx_[:, ps]
                    xp.multiply(centred, scale, out=h)
                    h += b_half
                    xp.tanh(h, out=dz)
                    xp.subtract(1, dz, out=slope)
                    slope *= h
                    slope += 1
                    dz += 1
                    dz *= slope
                    dz *= dy_[:, ps]
                xp.multiply(dz, centred, out=h)
                return _sums(h, dz, positions)

            # dx = rstd · (w dz − mean(w dz) − normal · mean(w dz · normal)), means over a group,
            # for normal = rstd · centred
            means = half * reduce(add, on_free_cores(moments, cut, x_.size, x))
            means[0] *= rstd_
            along, across = group_means(means * w) * rstd_
            along *= rstd_

            def spread_out(ps):
                dz, centred = (dx_ if silu else dy_)[:, ps], _scratch_like(dx_[:, ps])[0]
                xp.subtract(x_[:, ps], mean_, out=centred)
                centred *= along
                centred += across
                dz = xp.multiply(dz, scale, out=dx_[:, ps])
                dz -= centred

            on_free_cores(spread_out, cut, x_.size, x)
            return means.sum(axis=(1, 2))

        dw, db = reduce(add, on_free_cores(part, samples, x.size, x)) * positions
        return dx.reshape(x.shape), *((dw, db) if weights else (None, None))

    return y.reshape(x.shape), backward


def _scratch_like(x, count=1):
    return [flat.reshape(x.shape) for flat in scratch(x, *[x.size] * count)]


def _sums(*arrays_and_divisor):
    """Σ over positions / divisor, (n, p, c) → (n, 1, c), as a product: faster than `sum` here.

    Those of several arrays come in one, as (number of arrays, n, 1, c).
    """
    *arrays, divisor = arrays_and_divisor
    xp = array_module(arrays[0])
    n, p, c = arrays[0].shape
    weights = _equal_weights(xp, p, divisor, arrays[0].dtype.char)
    if len(arrays) == 1:
        return weights @ arrays[0]
    sums = xp.empty((len(arrays), n, 1, c), arrays[0].dtype)
    for x, out in zip(arrays, sums, strict=True):
        xp.matmul(weights, x, out=out)
    return sums


@functools.cache
def _equal_weights(xp, p, divisor, dtype):
    return xp.full((1, p), 1 / divisor, dtype)


@functools.cache
def _group_means(xp, c, groups, dtype):
    """A function that replaces each channel (..., c) by the mean of its group."""
    size = c // groups
    members = (xp.arange(groups)[:, None] == xp.arange(c) // size).astype(dtype)  # (groups, c)
    weights = members.T * (1 / size)
    return lambda x: (x.reshape(-1, c) @ weights @ members).reshape(x.shape)


@differentiable
def unit_norm(x: Array, eps: float = 1e-10) -> tuple[Array, Backward]:
    """x (..., d) divided by its length, plus eps, along the last axis; where all is 0, slope 0.

    So maps of features are compared by their direction alone (Zhang et al. 2018, section 3).
    """
    xp = array_module(x)
    length = xp.sqrt((x * x).sum(axis=-1, keepdims=True))
    scale = 1 / (length + eps)
    y = x * scale

    def backward(dy):
        # d length = x · dx / length
        along = (dy * y).sum(axis=-1, keepdims=True) * scale
        dx = scale * dy - x * (along / xp.where(length == 0, 1, length))
        return xp.where(length == 0, 0, dx)

    return y, backward


@differentiable
def layer_norm(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Backward]:
    """Normalise the last axis, scale, shift; x (..., d), w and b (d,) (Ba et al. 2016, eq. 3)."""
    xp = array_module(x)
    x2 = as_rows(x)
    d = x2.shape[1]
    y = empty(x2.shape, x, w)
    mean = xp.empty((len(x2), 1), x.dtype)
    rstd = xp.empty_like(mean)
    average = xp.full((d, 1), 1 / d, x.dtype)

    def forward(x_, y_, mean_, rstd_):
        (square,) = _scratch_like(y_)
        xp.matmul(x_, average, out=mean_)
        xp.subtract(x_, mean_, out=y_)
        xp.multiply(y_, y_, out=square)
        rstd_[...] = 1 / xp.sqrt(square @ average + eps)
        y_ *= rstd_
        y_ *= w
        y_ += b

    each_piece(forward, x2, y, mean, rstd)

    def backward(dy, weights=True):
        dx = empty(x2.shape, dy, w)
        w_average = (w * (1 / d))[:, None]

        def part(x_, dy_, dx_, mean_, rstd_):
            normal, weighted = _scratch_like(dx_, 2)
            xp.subtract(x_, mean_, out=normal)
            normal *= rstd_
            xp.multiply(dy_, normal, out=weighted)
            along, across = weighted @ w_average, dy_ @ w_average
            ones = xp.ones((1, len(x_)), x.dtype)
            dw_db = (ones @ weighted, ones @ dy_) if weights else None
            xp.multiply(dy_, w, out=dx_)
            dx_ -= across
            normal *= along
            dx_ -= normal
            dx_ *= rstd_
            return dw_db

        parts = each_piece(part, x2, as_rows(dy), dx, mean, rstd)
        dx = dx.reshape(x.shape)
        return (dx, *(sum(z)[0] for z in zip(*parts, strict=True))) if weights else (dx, None, None)

    return y.reshape(x.shape), backward
