"""The mathematics of the layers, without names: arrays in, array and backward pass out.

`backward(dy)` returns the gradients of the arrays in their order. Where there are weights,
`backward(dy, weights=False)` leaves out theirs, and the work for them.

Shapes: n batch, h height, w width, c channels, l tokens, d features. Images lie as (n, h, w, c),
so that channels are neighbours in memory and a matrix product over them needs no transpose.

Each function works in float32, float64 and complex128. Complex numbers are there for the
complex-step derivative of `check_gradients`, so everything stays analytic: no `abs`, no `var`, no
buffer of a real dtype, and comparisons look at the real part.
"""

import math

from tinyldm.backend import Array, array_module, on_host
from tinyldm.nn.protocol import Backward, differentiable

# ------------------------------------------------------------------------------------------ linear


@differentiable
def linear(x: Array, w: Array, b: Array | None = None) -> tuple[Array, Backward]:
    """Linear map: y = x wᵀ + b, for x (..., d_in), w (d_out, d_in), b (d_out,) → (..., d_out).

    dx = dy w, dw = dyᵀ x and db = Σ dy, both summed over all rows of x.
    """
    y = x @ w.T
    if b is not None:
        y = y + b

    def backward(dy, weights=True):
        dx = dy @ w
        if not weights:
            return dx, None, None
        dy_rows, x_rows = dy.reshape(-1, len(w)), x.reshape(-1, w.shape[1])
        return dx, dy_rows.T @ x_rows, None if b is None else dy_rows.sum(axis=0)

    return y, backward


@differentiable
def embedding(ids: Array, table: Array) -> tuple[Array, Backward]:
    """Look up rows of `table` (vocabulary, d) at the integers `ids` (...) → (..., d).

    backward(dy) → None, dtable. Raises ValueError for an id outside the table, on the CPU only: a
    check on a GPU would wait for all that it has to do.
    """
    xp = array_module(table)
    last = table.shape[0] - 1
    if on_host(ids) and ids.size and not 0 <= ids.min() <= ids.max() <= last:
        raise ValueError(f"embedding: expected integers 0…{last}, found {ids.min()}…{ids.max()}")

    def backward(dy, weights=True):
        if not weights:
            return None, None
        dtable = xp.zeros_like(table)
        rows = dy.reshape(-1, table.shape[1])
        xp.add.at(dtable, ids.reshape(-1), rows)  # adds up where an id occurs twice
        return None, dtable

    return table[ids], backward


@differentiable
def offset(x: Array, table: Array) -> tuple[Array, Backward]:
    """Add the first l rows of `table` (length, d) to x (n, l, d), the same for every sample.

    Raises ValueError for more tokens than rows.
    """
    l = x.shape[1]
    if l > len(table):
        raise ValueError(f"offset: expected at most {len(table)} tokens, found {l}")

    def backward(dy, weights=True):
        if not weights:
            return dy, None
        dtable = array_module(table).zeros_like(table)
        dtable[:l] = dy.sum(axis=0)
        return dy, dtable

    return x + table[:l], backward


# -------------------------------------------------------------------------------- shape and joining


@differentiable
def upsample_nearest(x: Array, size: tuple[int, int] | None = None) -> tuple[Array, Backward]:
    """Double height and width by repetition; x (n, h, w, c) → (n, 2h, 2w, c).

    `size` (height, width) may ask for one row or column less, for images of odd size. Raises
    ValueError for any other size.
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
def mean(x: Array, axes: tuple[int, ...]) -> tuple[Array, Backward]:
    """Average over some axes, which stay with length 1: for (1, 2), (n, h, w, c) → (n, 1, 1, c)."""
    shape = x.shape

    def backward(dy):
        return array_module(dy).zeros(shape, dy.dtype) + dy * (dy.size / math.prod(shape))

    return x.mean(axes, keepdims=True), backward


@differentiable
def concatenate(x: Array, y: Array, axis: int = -1) -> tuple[Array, Backward]:
    """Join two arrays along `axis`, as the U-Net joins a skip to its features."""
    xp = array_module(x)
    size = x.shape[axis]

    def backward(dz):
        dx, dy = xp.split(dz, [size], axis=axis)
        return xp.ascontiguousarray(dx), xp.ascontiguousarray(dy)

    return xp.concatenate([x, y], axis=axis), backward


def time_embedding(
    t: Array,
    d: int,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0,
    max_period: float = 10_000,
) -> Array:
    """Sinusoidal embedding of time steps t (n,) → (n, d), float64 (Vaswani et al. 2017, sec. 3.5).

    Frequencies are max_period^(−i / (d/2 − freq_shift)); cosines come first if `flip_sin_to_cos`.
    Not differentiable: time steps are integers. An odd `d` ends in a zero. Raises ValueError
    where `d` leaves no frequency.
    """
    xp = array_module(t)
    half = d // 2
    if half <= freq_shift:
        raise ValueError(
            f"time_embedding: expected d ≥ 2 and d // 2 > freq_shift = {freq_shift}, found d = {d}"
        )
    frequencies = xp.exp(xp.arange(half) * (-math.log(max_period) / (half - freq_shift)))
    angles = t.astype("float64")[:, None] * frequencies
    waves = (
        [xp.cos(angles), xp.sin(angles)] if flip_sin_to_cos else [xp.sin(angles), xp.cos(angles)]
    )
    return xp.concatenate([*waves, xp.zeros((t.shape[0], d % 2))], axis=1)


# ------------------------------------------------------------------------------------------- losses
#
# Each returns a scalar, an array without axes that stays on the device, and backward(dloss = 1).


@differentiable
def mse(x: Array, target: Array, weight: Array | None = None) -> tuple[Array, Backward]:
    """Mean squared error, both (n, ...), optionally weighted per sample by `weight` (n,)."""
    difference = x - target
    scaled = difference if weight is None else difference * _per_sample(weight, x)

    def backward(dloss=1.0):
        dx = scaled * (dloss * (2 / x.size))
        return dx, -dx

    return (scaled * difference).mean(), backward


@differentiable
def kl_to_standard_normal(mean: Array, logvar: Array) -> tuple[Array, Backward]:
    """KL divergence of N(mean, e^logvar) from N(0, 1), summed over a sample, averaged over samples.

    mean, logvar (n, ...). Kingma & Welling 2013, appendix B.
    """
    xp = array_module(mean)
    variance = xp.exp(logvar)
    n = mean.shape[0]

    def backward(dloss=1.0):
        return mean * (dloss / n), (variance - 1) * (0.5 * dloss / n)

    return 0.5 * (mean * mean + variance - 1 - logvar).sum() / n, backward


@differentiable
def hinge(on_real: Array, on_fake: Array) -> tuple[Array, Backward]:
    """Hinge loss ½ mean max(0, 1 − on_real) + ½ mean max(0, 1 + on_fake), of logits (n, ...).

    It wants logits above 1 for real images and below −1 for others, and no more than that (Lim &
    Ye 2017, "Geometric GAN"; Miyato et al. 2018, eq. 16). The slope at both ends is taken as 0.
    """
    too_low, too_high = on_real.real < 1, on_fake.real > -1

    def backward(dloss=1.0):
        dreal = too_low.astype(on_real.dtype) * (-0.5 * dloss / on_real.size)
        dfake = too_high.astype(on_fake.dtype) * (0.5 * dloss / on_fake.size)
        return dreal, dfake

    loss = 0.5 * (((1 - on_real) * too_low).mean() + ((1 + on_fake) * too_high).mean())
    return loss, backward


@differentiable
def weighted_mean(x: Array, weight: Array | float) -> tuple[Array, Backward]:
    """Mean of weight · x, for x (n, ...) and a weight, one or (n,), which has no gradient."""
    weights = weight if isinstance(weight, float) else _per_sample(weight, x)

    def backward(dloss=1.0):
        return array_module(x).zeros_like(x) + weights * (dloss / x.size)

    return (weights * x).mean(), backward


@differentiable
def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Backward]:
    """Cross entropy: mean of −log softmax(logits)[label], logits (n, k), integer labels (n,).

    Its backward pass returns dlogits alone. Raises ValueError for a label outside 0…k − 1, on the
    CPU only.
    """
    xp = array_module(logits)
    n, k = logits.shape
    if on_host(labels) and labels.size and not 0 <= labels.min() <= labels.max() < k:
        raise ValueError(
            f"cross_entropy: expected labels 0…{k - 1}, found {labels.min()}…{labels.max()}"
        )
    right = xp.arange(n), labels
    shifted = logits - logits.real.max(axis=1, keepdims=True)  # so that no exponential overflows
    powers = xp.exp(shifted)
    total = powers.sum(axis=1, keepdims=True)

    def backward(dloss=1.0):
        dlogits = powers / total
        dlogits[right] -= 1
        return dlogits * (dloss / n)

    return (xp.log(total[:, 0]) - shifted[right]).mean(), backward


def _per_sample(weight, x):
    return weight.reshape(-1, *[1] * (x.ndim - 1))
