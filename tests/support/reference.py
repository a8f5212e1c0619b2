"""The mathematics once more, in loops over single numbers: slow, and right at a glance.

Everything here is float64 and shares no code with the library. Names and arguments are those of
the function that it is the reference of, so a test can look one up by the name of the other.
"""

import math

import numpy as np


def assert_near(x, expected, tol=1e-12):
    """Of equal shape, and equal up to `tol` of the largest number (or of 1)."""
    assert np.shape(x) == np.shape(expected)
    scale = 1 + np.max(np.abs(expected), initial=0)
    assert np.max(np.abs(x - expected), initial=0) <= tol * scale


# ----------------------------------------------------------------------------------------- products


def offset(x, table):
    y = np.array(x)
    for n, l, d in np.ndindex(*x.shape):
        y[n, l, d] += table[l, d]
    return y


def linear(x, w, b=None):
    y = np.zeros((*x.shape[:-1], w.shape[0]))
    for at in np.ndindex(y.shape):
        *row, k = at
        y[at] = sum(x[*row, i] * w[k, i] for i in range(w.shape[1]))
        if b is not None:
            y[at] += b[k]
    return y


def embedding(table, ids):
    y = np.zeros((*ids.shape, table.shape[1]))
    for at in np.ndindex(y.shape):
        *place, column = at
        y[at] = table[ids[*place], column]
    return y


def concatenate(x, y, axis=-1):
    shape = list(x.shape)
    shape[axis] += y.shape[axis]
    z = np.zeros(shape)
    for at in np.ndindex(z.shape):
        after = list(at)
        after[axis] -= x.shape[axis]
        z[at] = x[at] if after[axis] < 0 else y[*after]
    return z


# -------------------------------------------------------------------------------------- convolution


def conv2d_shape(x_shape, w_shape, stride, padding):
    top, bottom, left, right = four_sides(padding)
    n, h, w, _ = x_shape
    kh, kw, _, c_out = w_shape
    return n, (h + top + bottom - kh) // stride + 1, (w + left + right - kw) // stride + 1, c_out


def conv2d_terms(x_shape, w_shape, stride, padding):
    """Where in y, x and w: each y is the sum of its terms x · w. The padding adds nothing."""
    top, _, left, _ = four_sides(padding)
    kh, kw, c_in, _ = w_shape
    samples, out_h, out_w, c_out = conv2d_shape(x_shape, w_shape, stride, padding)
    for n in range(samples):
        for row in range(out_h):
            for column in range(out_w):
                for i in range(kh):
                    for j in range(kw):
                        x_row, x_column = row * stride + i - top, column * stride + j - left
                        if not (0 <= x_row < x_shape[1] and 0 <= x_column < x_shape[2]):
                            continue
                        for c in range(c_in):
                            for k in range(c_out):
                                yield (n, row, column, k), (n, x_row, x_column, c), (i, j, c, k)


def four_sides(padding):
    return (padding,) * 4 if isinstance(padding, int) else padding


def conv2d(x, w, b=None, stride=1, padding=1):
    y = np.zeros(conv2d_shape(x.shape, w.shape, stride, padding))
    for in_y, in_x, in_w in conv2d_terms(x.shape, w.shape, stride, padding):
        y[in_y] += x[in_x] * w[in_w]
    if b is not None:
        for in_y in np.ndindex(y.shape):
            y[in_y] += b[in_y[3]]
    return y


def conv2d_backward(dy, x, w, stride=1, padding=1):
    """→ dx, dw, db."""
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape[3])
    for in_y, in_x, in_w in conv2d_terms(x.shape, w.shape, stride, padding):
        dx[in_x] += dy[in_y] * w[in_w]
        dw[in_w] += dy[in_y] * x[in_x]
    for in_y in np.ndindex(dy.shape):
        db[in_y[3]] += dy[in_y]
    return dx, dw, db


def upsample_nearest(x, size=None):
    n, h, w, c = x.shape
    out_h, out_w = size or (2 * h, 2 * w)
    y = np.zeros((n, out_h, out_w, c))
    for sample, row, column, k in np.ndindex(y.shape):
        y[sample, row, column, k] = x[sample, row // 2, column // 2, k]
    return y


def mean(x, axes):
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    y = np.zeros(shape)
    for at in np.ndindex(x.shape):
        y[tuple(0 if axis in axes else i for axis, i in enumerate(at))] += x[at] * y.size / x.size
    return y


# -------------------------------------------------------------------------------------- activations


def each(f, x):
    y = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        y[at] = f(x[at])
    return y


def silu(x):
    return each(lambda z: z / (1 + math.exp(-z)), x)


def leaky_relu(x, slope=0.2):
    return each(lambda z: z if z > 0 else slope * z, x)


def quick_gelu(x):
    return each(lambda z: z / (1 + math.exp(-1.702 * z)), x)


def gelu(x):
    return each(lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2, x)


def geglu(x):
    d = x.shape[-1] // 2
    gates = gelu(x[..., d:])
    y = np.zeros(gates.shape)
    for at in np.ndindex(y.shape):
        y[at] = x[at] * gates[at]
    return y


# ----------------------------------------------------------------------------------- normalisations


def normalised(values, eps):
    """Numbers moved to mean 0 and divided by their standard deviation, almost."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + eps) for value in values]


def group_norm(x, w, b, groups, eps):
    y = np.zeros(x.shape)
    size = x.shape[-1] // groups
    for n in range(x.shape[0]):
        for group in range(groups):
            channels = range(group * size, (group + 1) * size)
            places = [(*p, c) for p in np.ndindex(x.shape[1:-1]) for c in channels]
            values = normalised([x[n, *place] for place in places], eps)
            for place, value in zip(places, values, strict=True):
                y[n, *place] = value * w[place[-1]] + b[place[-1]]
    return y


def group_norm_silu(x, w, b, groups, eps):
    return silu(group_norm(x, w, b, groups, eps))


def layer_norm(x, w, b, eps):
    y = np.zeros(x.shape)
    for row in np.ndindex(x.shape[:-1]):
        for i, value in enumerate(normalised(list(x[row]), eps)):
            y[*row, i] = value * w[i] + b[i]
    return y


def unit_norm(x, eps=1e-10):
    y = np.zeros(x.shape)
    for row in np.ndindex(x.shape[:-1]):
        length = math.sqrt(sum(value**2 for value in x[row]))
        for i, value in enumerate(x[row]):
            y[*row, i] = value / (length + eps)
    return y


# ---------------------------------------------------------------------------------------- attention


def attention(q, k, v, heads, causal=False):
    y = np.zeros((*q.shape[:2], v.shape[2]))
    d, d_v = q.shape[2] // heads, v.shape[2] // heads
    for n in range(q.shape[0]):
        for head in range(heads):
            for i in range(q.shape[1]):
                seen = range(min(i + 1, k.shape[1]) if causal else k.shape[1])
                columns = range(head * d, (head + 1) * d)
                scores = [sum(q[n, i, c] * k[n, j, c] for c in columns) for j in seen]
                weights = softmax([score / math.sqrt(d) for score in scores])
                for c in range(head * d_v, (head + 1) * d_v):
                    y[n, i, c] = sum(weights[j] * v[n, j, c] for j in seen)
    return y


def softmax(scores):
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


# ------------------------------------------------------------------------------------ time and loss


def time_embedding(t, d, flip_sin_to_cos=True, freq_shift=0, max_period=10_000):
    y = np.zeros((len(t), d))
    half = d // 2
    for n in range(len(t)):
        for i in range(half):
            angle = t[n] * max_period ** (-i / (half - freq_shift))
            waves = (math.cos(angle), math.sin(angle))
            y[n, i], y[n, half + i] = waves if flip_sin_to_cos else waves[::-1]
    return y


def mse(x, target, weight=None):
    return average(
        (1 if weight is None else weight[at[0]]) * (x[at] - target[at]) ** 2
        for at in np.ndindex(x.shape)
    )


def kl_to_standard_normal(mean, logvar):
    total = 0.0
    for at in np.ndindex(mean.shape):
        total += (mean[at] ** 2 + math.exp(logvar[at]) - 1 - logvar[at]) / 2
    return total / mean.shape[0]


def hinge(real, fake):
    short = average(max(0, 1 - real[at]) for at in np.ndindex(real.shape))
    over = average(max(0, 1 + fake[at]) for at in np.ndindex(fake.shape))
    return (short + over) / 2


def perceptual_loss(maps, wanted):
    total = 0.0
    for x, target in zip(map(unit_norm, maps), map(unit_norm, wanted), strict=True):
        total += x.shape[-1] * mse(x, target)
    return total


def weighted_mean(x, weight):
    weight = np.broadcast_to(weight, len(x))
    return average(weight[at[0]] * x[at] for at in np.ndindex(x.shape))


def cross_entropy(logits, labels):
    return average(-math.log(softmax(list(row))[k]) for row, k in zip(logits, labels, strict=True))


def average(values):
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------- optimizer


def adamw(w, g, m, v, step, lr, betas, eps, decay):
    """One step of AdamW for one number, steps counted from 0 → w, m, v."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    m_hat = m / (1 - betas[0] ** (step + 1))
    v_hat = v / (1 - betas[1] ** (step + 1))
    w = w - lr * decay * w
    return w - lr * m_hat / (math.sqrt(v_hat) + eps), m, v


def nearest_codes(z, codebook):
    codes = np.empty(z.shape[:-1], int)
    for at in np.ndindex(codes.shape):
        distances = [((z[at] - e) ** 2).sum() for e in codebook]
        codes[at] = min(range(len(codebook)), key=distances.__getitem__)
    return codes


def straight_through(z, codebook):
    codes = nearest_codes(z, codebook)
    y = np.empty(z.shape)
    for at in np.ndindex(codes.shape):
        y[at] = codebook[codes[at]]
    return y


def codebook_loss(z, codebook, codes, commitment):
    squares = [(codebook[codes[at[:-1]]][at[-1]] - z[at]) ** 2 for at in np.ndindex(z.shape)]
    return (1 + commitment) * average(squares)
