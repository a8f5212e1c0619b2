"""Attention in blocks of queries, on any device; the twin of `nn.attention.attention`.

The matrix of scores is computed a block at a time and discarded. The backward pass keeps the
output and, per query, the logarithm of the softmax's denominator, from which a block's
probabilities are recomputed: memory is linear in the number of tokens (Rabe & Staats 2021; Dao et
al. 2022, algorithm 4).

A pass over the scores costs as much as the matrix products, so these do two subtractions of the
backward pass. One more column of q with a row of ones in kᵀ subtracts the logarithm from each row
of scores; one more column of dy with one of ones in v subtracts the mean of a row's gradients.
"""

import functools
import math

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.blocking import blocks, on_free_cores
from tinyldm.kernels.matmul import product
from tinyldm.kernels.registry import any_device, kernel
from tinyldm.kernels.workspace import empty, scratch
from tinyldm.nn.attention import split_heads
from tinyldm.nn.protocol import Backward

BLOCK_SCORES = 2**20  # scores at a time: 4 MiB of float32
SAFE_SCORE = 60.0  # e^±60 and a sum of thousands of them are within the range of float32


@kernel("nn.attention.attention", cost=any_device)
def attention(
    q: Array, k: Array, v: Array, heads: int, causal: bool = False
) -> tuple[Array, Backward]:
    """Attend in blocks of BLOCK_SCORES scores: what fits the cache or, on a GPU, 64 times that."""
    xp = array_module(q)
    n, l, d = q.shape
    m, e = v.shape[1:]
    scale = 1 / math.sqrt(d // heads)
    block = BLOCK_SCORES if on_host(q) else 64 * BLOCK_SCORES
    scaled = q * scale
    queries, keys, values = (split_heads(x, heads) for x in (scaled, k, v))
    ones = xp.ones((m, 1), v.dtype)
    shift = not _within(SAFE_SCORE, q, k, heads, scale)
    y, log_sum = empty((n, l, e), q), empty((n, heads, l, 1), q)
    y_ = split_heads(y, heads)

    def forward(ns, hs, ls):
        (p,) = _scores(queries[ns, hs, ls], keys[ns, hs].swapaxes(2, 3))  # (…, queries, m)
        if causal:
            p += _causal_mask(xp, ls, m)
        if shift:
            top = p.real.max(axis=3, keepdims=True)
            p -= top
        xp.exp(p, out=p)
        total = p @ ones  # a product is faster than `sum`
        xp.divide(p @ values[ns, hs], total, out=y_[ns, hs, ls])
        xp.log(total, out=total)
        log_sum[ns, hs, ls] = total + top if shift else total

    head_blocks, query_blocks = score_blocks(n, heads, l, m, block)
    work = [(ns, hs, ls) for ns, hs in head_blocks for ls in query_blocks]
    on_free_cores(lambda item: forward(*item), work, n * heads * l * m, q)

    def backward(dy):
        # softmax: ds = p (dp − Σ p dp), where Σ p dp = Σ dy y
        queries, dys = _widened(scaled, heads), _widened(dy, heads)
        xp.negative(log_sum, out=queries[..., -1:])
        mean = split_heads(dy * y, heads) @ xp.ones((e // heads, 1), y.dtype)
        xp.negative(mean, out=dys[..., -1:])
        keys_t, values_t = (_widened(x, heads) for x in (k, v))
        keys_t[..., -1] = values_t[..., -1] = 1
        keys_t, values_t = (x.swapaxes(2, 3).copy() for x in (keys_t, values_t))
        dqs, dks, dvs = (xp.zeros(x.shape, x.dtype) for x in (queries[..., :-1], keys, values))

        def part(heads_):
            ns, hs = heads_
            for ls in query_blocks:
                p, ds = _scores(
                    queries[ns, hs, ls], keys_t[ns, hs], dys[ns, hs, ls], values_t[ns, hs]
                )
                if causal:
                    p += _causal_mask(xp, ls, m)
                xp.exp(p, out=p)
                ds *= p
                xp.matmul(ds, keys[ns, hs], out=dqs[ns, hs, ls])
                dks[ns, hs] += ds.swapaxes(2, 3) @ queries[ns, hs, ls, :-1]
                dvs[ns, hs] += p.swapaxes(2, 3) @ dys[ns, hs, ls, :-1]

        on_free_cores(part, head_blocks, n * heads * l * m, q)
        dqs *= scale
        return tuple(_joined(dx) for dx in (dqs, dks, dvs))

    return y, backward


def _scores(*pairs):
    """Compute the products a b of pairs (a, b, a, b, …), in scratch memory."""
    shapes = [(*a.shape[:-1], b.shape[-1]) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    memory = scratch(pairs[0], *map(math.prod, shapes))
    products = [part.reshape(shape) for part, shape in zip(memory, shapes, strict=True)]
    for a, b, out in zip(pairs[::2], pairs[1::2], products, strict=True):
        product(a, b, out)
    return products


def score_blocks(
    n: int, heads: int, l: int, m: int, budget: int
) -> tuple[list[tuple[slice, slice]], list[slice]]:
    """Cut into [(samples, heads)], [queries]: any of both together have at most `budget` scores."""
    if n * heads * l * m <= budget:
        return [(slice(0, n), slice(0, heads))], [slice(0, l)]
    queries = blocks(1, l, m, max(budget, 1) if l * m > budget else l * m)
    return list(blocks(n, heads, l * m, budget)), [ls for _, ls in queries]


def _within(limit, q, k, heads, scale):
    """Return whether all scores are within `limit`: |q·k| ≤ |q| |k|. No on a GPU: it would wait."""
    if not on_host(q):
        return False
    of_heads = _head_sums(heads, q.shape[2], q.real.dtype.char)
    longest = ((x.real * x.real @ of_heads).max(axis=1) for x in (q, k))  # (n, heads) each
    return math.prod(longest).max() * scale**2 <= limit**2


@functools.cache
def _head_sums(heads, d, dtype):
    """Return the matrix that sums (n, l, d) over the features of each head, to (n, l, heads)."""
    return np.repeat(np.eye(heads, dtype=dtype), d // heads, axis=0)


def _causal_mask(xp, ls, m):
    """Return the causal mask (l, m): −∞ where token i of `ls` must not attend to token j, or 0."""
    return xp.where(xp.arange(m) > xp.arange(ls.start, ls.stop)[:, None], -math.inf, 0)


def _widened(x, heads):
    """Copy (n, l, d) → (n, heads, l, d / heads + 1); the last column is not set."""
    x_ = split_heads(x, heads)
    wide = empty((*x_.shape[:3], x_.shape[3] + 1), x)
    wide[..., :-1] = x_
    return wide


def _joined(x):
    """Copy (n, heads, l, d / heads) → (n, l, d), into aligned memory."""
    n, heads, l, d = x.shape
    joined = empty((n, l, heads * d), x)
    split_heads(joined, heads)[...] = x
    return joined
