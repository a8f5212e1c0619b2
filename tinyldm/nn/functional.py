"""The mathematics of the layers, without names: arrays in, array and backward pass out.

Shapes: n batch, h height, w width, c channels, l tokens, d features. Pictures lie as (n, h, w, c),
so that channels are neighbours in memory and a matrix product over them needs no transpose.

Each function works in float32, float64 and complex128. Complex numbers are there for the
complex-step derivative of `check_gradients`, so everything stays analytic: no `abs`, no `var`, no
buffer of a real dtype, and comparisons look at the real part.
"""

import math

from tinyldm.backend import array_module, erf, on_host
from tinyldm.nn.protocol import differentiable

# Elements of one array that a memory-bound loop touches at a time: 256 KiB of float32, so that
# the handful of arrays it works on stays in a core's second-level cache.
PIECE = 2**16


def pieces(*arrays):
    """Cut arrays of equal length into aligned runs of rows that fit the cache together.

    On a GPU there is one piece: kernels stream, and each launch costs.
    """
    rows = arrays[0].shape[0]
    size = max(1, math.prod(arrays[0].shape[1:]))
    step = max(1, PIECE // size) if on_host(arrays[0]) else max(1, rows)
    for start in range(0, rows, step):
        yield tuple(array[start : start + step] for array in arrays)


def blocks(samples, rows, row_size, budget):
    """Cut samples × rows, each row of `row_size`, into (samples, rows) slices within `budget`.

    A block is a run of whole samples or, where one sample is too large, a run of its rows.
    """
    whole = int(budget // (row_size * rows))
    if whole >= 1:
        for start in range(0, samples, whole):
            yield slice(start, min(samples, start + whole)), slice(0, rows)
    else:
        some = max(1, int(budget // row_size))
        for sample in range(samples):
            for start in range(0, rows, some):
                yield slice(sample, sample + 1), slice(start, min(rows, start + some))


def _rows(x):
    """`x` as a matrix of its last axis, without a copy."""
    return x.reshape(-1, x.shape[-1])


# ------------------------------------------------------------------------------------------ linear


@differentiable
def linear(x, w, b=None):
    """y = x wᵀ + b, for x (..., d_in), w (d_out, d_in), b (d_out,)."""
    x2 = _rows(x)
    y = x2 @ w.T
    if b is not None:
        y += b

    def backward(dy, weights=True):
        dy2 = _rows(dy)
        dx = (dy2 @ w).reshape(x.shape)
        if not weights:
            return dx, None, None
        return dx, dy2.T @ x2, None if b is None else dy2.sum(axis=0)

    return y.reshape(*x.shape[:-1], w.shape[0]), backward


@differentiable
def embedding(table, ids):
    """Rows of `table` (vocabulary, d) at the whole numbers `ids` (...): (..., d)."""
    xp = array_module(table)
    last = table.shape[0] - 1
    if on_host(ids) and ids.size and not 0 <= ids.min() <= ids.max() <= last:
        raise ValueError(
            f"embedding: expected whole numbers 0…{last}, found {ids.min()}…{ids.max()}"
        )

    def backward(dy):
        dtable = xp.zeros_like(table)
        xp.add.at(dtable, ids.reshape(-1), _rows(dy))  # adds up where an id occurs twice
        return dtable

    return table[ids], backward


@differentiable
def offset(x, table):
    """x (n, l, d) plus the first l rows of `table` (length, d), the same for every sample."""
    l = x.shape[1]

    def backward(dy, weights=True):
        if not weights:
            return dy, None
        dtable = array_module(table).zeros_like(table)
        dtable[:l] = dy.sum(axis=0)
        return dy, dtable

    return x + table[:l], backward


# ------------------------------------------------------------------------------------- activations


@differentiable
def silu(x):
    """y = x σ(x) (Ramachandran et al. 2017, "Searching for activation functions")."""
    xp = array_module(x)
    y = xp.empty(x.shape, x.dtype)
    for x_, y_ in pieces(_rows(x), _rows(y)):
        xp.multiply(x_, _sigmoid(x_), out=y_)

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)
        for x_, dy_, dx_ in pieces(_rows(x), _rows(dy), _rows(dx)):
            xp.multiply(dy_, _silu_slope(x_), out=dx_)
        return dx

    return y, backward


def _sigmoid(x):
    """1 / (1 + e⁻ˣ) as ½ + ½ tanh(x/2), which cannot overflow."""
    s = array_module(x).tanh(0.5 * x)
    s *= 0.5
    s += 0.5
    return s


def _silu_slope(x):
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


@differentiable
def quick_gelu(x):
    """y = x σ(1.702 x), CLIP's approximation of GELU."""
    xp = array_module(x)
    y = xp.empty(x.shape, x.dtype)
    for x_, y_ in pieces(_rows(x), _rows(y)):
        xp.multiply(x_, _sigmoid(1.702 * x_), out=y_)

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)
        for x_, dy_, dx_ in pieces(_rows(x), _rows(dy), _rows(dx)):
            s = _sigmoid(1.702 * x_)
            xp.multiply(dy_, s * (1 + 1.702 * x_ * (1 - s)), out=dx_)
        return dx

    return y, backward


@differentiable
def gelu(x):
    """y = x Φ(x), with Φ the exact normal distribution (Hendrycks & Gimpel 2016)."""
    xp = array_module(x)
    y = xp.empty(x.shape, x.dtype)
    for x_, y_ in pieces(_rows(x), _rows(y)):
        xp.multiply(x_, normal_cdf(x_), out=y_)

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)
        for x_, dy_, dx_ in pieces(_rows(x), _rows(dy), _rows(dx)):
            xp.multiply(dy_, normal_cdf(x_) + x_ * _normal_density(x_), out=dx_)
        return dx

    return y, backward


@differentiable
def geglu(x):
    """y = value · gelu(gate) for x = [value, gate] (..., 2d) → (..., d) (Shazeer 2020, eq. 6)."""
    xp = array_module(x)
    d = x.shape[-1] // 2
    y = xp.empty((*x.shape[:-1], d), x.dtype)
    for x_, y_ in pieces(_rows(x), _rows(y)):
        value, gate = x_[:, :d], x_[:, d:]
        cdf = normal_cdf(gate)
        cdf *= gate
        xp.multiply(value, cdf, out=y_)

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)
        for x_, dy_, dx_ in pieces(_rows(x), _rows(dy), _rows(dx)):
            value, gate = x_[:, :d], x_[:, d:]
            cdf = normal_cdf(gate)
            slope = _normal_density(gate)
            slope *= gate
            slope += cdf
            slope *= value
            cdf *= gate
            xp.multiply(dy_, cdf, out=dx_[:, :d])
            xp.multiply(dy_, slope, out=dx_[:, d:])
        return dx

    return y, backward


def _normal_density(x):
    y = x * x
    y *= -0.5
    y = array_module(x).exp(y)
    y *= 1 / math.sqrt(2 * math.pi)
    return y


# erf(x/√2) = tanh(x P(x²)). The coefficients of P, lowest first, are the weighted minimax fit on
# |x| ≤ 5.6 that tests/test_functional.py repeats; in float32 the error stays below 1.5e-7.
_CDF_COEFFICIENTS = (
    7.97884941e-01,
    3.63330846e-02,
    -3.25949754e-05,
    -5.53061938e-05,
    3.96474443e-06,
    -1.32263341e-07,
    1.75617078e-09,
)


def normal_cdf(x):
    """Φ(x) = ½ (1 + erf(x/√2)): exact but slow in float64, within 1e-7 and fast in float32."""
    if x.dtype != "float32":
        return 0.5 * (1 + erf(x * math.sqrt(0.5)))
    xp = array_module(x)
    x = xp.clip(x, -6, 6)  # beyond, Φ is 0 or 1 to the last bit
    square = x * x
    y = square * _CDF_COEFFICIENTS[-1]
    for coefficient in _CDF_COEFFICIENTS[-2:0:-1]:
        y += coefficient
        y *= square
    y += _CDF_COEFFICIENTS[0]
    y *= x
    xp.tanh(y, out=y)
    y *= 0.5
    y += 0.5
    return y


# ---------------------------------------------------------------------------------- normalisations


@differentiable
def group_norm(x, w, b, groups, eps, silu=False):
    """Normalise each group of channels over a picture, scale, shift; x (n, ..., c), w and b (c,).

    With `silu` the activation that follows is applied while the data are in the cache, and its
    input is made again in the backward pass instead of being kept (Wu & He 2018).
    """
    xp = array_module(x)
    c = x.shape[-1]
    x3 = x.reshape(x.shape[0], -1, c)
    size = x3.shape[1] * (c // groups)
    y = xp.empty_like(x3)
    # Per sample and channel: what to subtract, what to multiply by.
    mean = xp.empty((x3.shape[0], 1, c), x.dtype)
    rstd = xp.empty_like(mean)
    for x_, y_, mean_, rstd_ in pieces(x3, y, mean, rstd):
        mean_[...] = _group_mean(_channel_sums(x_), groups, size)
        xp.subtract(x_, mean_, out=y_)  # two passes: E[x²] − E[x]² would cancel
        rstd_[...] = 1 / xp.sqrt(_group_mean(_channel_sums(y_ * y_), groups, size) + eps)
        y_ *= rstd_ * w
        y_ += b
        if silu:
            y_ *= _sigmoid(y_)

    def backward(dy, weights=True):
        dx = xp.empty_like(x3)
        sums = xp.zeros((2, c), x.dtype)  # of dw and db
        for x_, dy_, dx_, mean_, rstd_ in pieces(x3, dy.reshape(x3.shape), dx, mean, rstd):
            normal = x_ - mean_
            normal *= rstd_
            if silu:
                dy_ = dy_ * _silu_slope(normal * w + b)
            dw_ = _channel_sums(dy_ * normal)
            db_ = _channel_sums(dy_)
            sums[0] += dw_.sum(axis=(0, 1))
            sums[1] += db_.sum(axis=(0, 1))
            # dx = rstd · (w dy − mean(w dy) − normal · mean(w dy · normal)), means over a group
            xp.multiply(dy_, rstd_ * w, out=dx_)
            dx_ -= rstd_ * _group_mean(db_ * w, groups, size)
            normal *= rstd_ * _group_mean(dw_ * w, groups, size)
            dx_ -= normal
        return dx.reshape(x.shape), *(sums if weights else (None, None))

    return y.reshape(x.shape), backward


def _channel_sums(x):
    """Sum over positions, (n, p, c) → (n, 1, c), as a matrix product: faster than `sum` here."""
    return array_module(x).ones((1, x.shape[1]), x.dtype) @ x


def _group_mean(sums, groups, size):
    """Means over groups of `size` elements from the sums per channel, repeated for each channel."""
    n, _, c = sums.shape
    means = sums.reshape(n, 1, groups, c // groups).sum(axis=3) * (1 / size)
    return array_module(sums).repeat(means, c // groups, axis=2)


@differentiable
def layer_norm(x, w, b, eps):
    """Normalise the last axis, scale and shift; x (..., d), w and b (d,) (Ba et al. 2016)."""
    xp = array_module(x)
    x2 = _rows(x)
    y = xp.empty_like(x2)
    mean = xp.empty((x2.shape[0], 1), x.dtype)
    rstd = xp.empty_like(mean)
    average = xp.full((x2.shape[1], 1), 1 / x2.shape[1], x.dtype)
    for x_, y_, mean_, rstd_ in pieces(x2, y, mean, rstd):
        mean_[...] = x_ @ average
        xp.subtract(x_, mean_, out=y_)
        rstd_[...] = 1 / xp.sqrt((y_ * y_) @ average + eps)
        y_ *= rstd_
        y_ *= w
        y_ += b

    def backward(dy, weights=True):
        dx = xp.empty_like(x2)
        dw, db = xp.zeros_like(w), xp.zeros_like(b)
        for x_, dy_, dx_, mean_, rstd_ in pieces(x2, _rows(dy), dx, mean, rstd):
            normal = x_ - mean_
            normal *= rstd_
            xp.multiply(dy_, w, out=dx_)
            correlation = (dx_ * normal) @ average
            if weights:
                dw += (dy_ * normal).sum(axis=0)
                db += dy_.sum(axis=0)
            dx_ -= dx_ @ average
            normal *= correlation
            dx_ -= normal
            dx_ *= rstd_
        return (dx.reshape(x.shape), dw, db) if weights else (dx.reshape(x.shape), None, None)

    return y.reshape(x.shape), backward


# -------------------------------------------------------------------------------- shape and joining


@differentiable
def upsample_nearest(x, size=None):
    """Double height and width by repetition; x (n, h, w, c) → (n, 2h, 2w, c).

    `size` (height, width) may ask for one row or column less, for pictures of odd size.
    """
    xp = array_module(x)
    n, h, w, c = x.shape
    out_h, out_w = size or (2 * h, 2 * w)
    if (out_h + 1) // 2 != h or (out_w + 1) // 2 != w:
        raise ValueError(
            f"upsample_nearest: {h}×{w} can become {2 * h}×{2 * w} (or one less each way), "
            f"not {out_h}×{out_w}"
        )
    y = xp.empty((n, h, 2, w, 2, c), x.dtype)
    y[...] = x[:, :, None, :, None, :]

    def backward(dy):
        if dy.shape[1:3] != (2 * h, 2 * w):
            whole = xp.zeros((n, 2 * h, 2 * w, c), dy.dtype)
            whole[:, :out_h, :out_w] = dy
            dy = whole
        quads = dy.reshape(n, h, 2, w, 2, c)
        return (
            quads[:, :, 0, :, 0]
            + quads[:, :, 0, :, 1]
            + quads[:, :, 1, :, 0]
            + quads[:, :, 1, :, 1]
        )

    return y.reshape(n, 2 * h, 2 * w, c)[:, :out_h, :out_w], backward


@differentiable
def concatenate(x, y, axis=-1):
    """Join two arrays along `axis`, as the U-Net joins a skip to its features."""
    xp = array_module(x)
    size = x.shape[axis]

    def backward(dz):
        dx, dy = xp.split(dz, [size], axis=axis)
        return xp.ascontiguousarray(dx), xp.ascontiguousarray(dy)

    return xp.concatenate([x, y], axis=axis), backward


def time_embedding(t, d, flip_sin_to_cos=True, freq_shift=0, max_period=10_000):
    """Sinusoids of the time steps t (n,) → (n, d), float64 (Ho et al. 2020, after Vaswani et al.).

    Frequencies are max_period^(−i / (d/2 − freq_shift)); cosines come first if `flip_sin_to_cos`.
    Not differentiable: time steps are whole numbers. An odd `d` ends in a zero.
    """
    xp = array_module(t)
    half = d // 2
    frequencies = xp.exp(xp.arange(half) * (-math.log(max_period) / (half - freq_shift)))
    angles = t.astype("float64")[:, None] * frequencies
    waves = (
        [xp.cos(angles), xp.sin(angles)] if flip_sin_to_cos else [xp.sin(angles), xp.cos(angles)]
    )
    return xp.concatenate([*waves, xp.zeros((t.shape[0], d % 2))], axis=1)


# ------------------------------------------------------------------------------------------- losses
#
# Each returns one number, an array without axes that stays on the device.


@differentiable
def mse(x, target, weight=None):
    """Mean of (x − target)², optionally weighted per sample by `weight` (n,)."""
    difference = x - target
    scaled = difference if weight is None else difference * _per_sample(weight, x)

    def backward(dloss=1.0):
        dx = scaled * (dloss * (2 / x.size))
        return dx, -dx

    return (scaled * difference).mean(), backward


@differentiable
def l1(x, target):
    """Mean of |x − target|; the slope at 0 is taken as 0."""
    xp = array_module(x)
    difference = x - target
    sign = xp.sign(difference.real).astype(x.dtype)  # |z| of a complex number is not analytic

    def backward(dloss=1.0):
        dx = sign * (dloss / x.size)
        return dx, -dx

    return (sign * difference).mean(), backward


@differentiable
def kl_to_standard_normal(mean, logvar):
    """KL(N(mean, e^logvar) ‖ N(0, 1)) summed over a sample, averaged over samples; both (n, ...).

    Kingma & Welling 2013, appendix B.
    """
    xp = array_module(mean)
    variance = xp.exp(logvar)
    n = mean.shape[0]

    def backward(dloss=1.0):
        return mean * (dloss / n), (variance - 1) * (0.5 * dloss / n)

    return 0.5 * (mean * mean + variance - 1 - logvar).sum() / n, backward


def _per_sample(weight, x):
    return weight.reshape(-1, *[1] * (x.ndim - 1))
