"""Scaled dot-product attention, softmax(q kᵀ / √d) v, in blocks of queries.

The matrix of scores is made a block at a time and thrown away. What is kept for the backward pass
is the output and, per query, the logarithm of the softmax's denominator, from which a block's
probabilities are made again: memory is linear in the number of tokens (Rabe & Staats 2021; Dao et
al. 2022, algorithm 4).
"""

import math

from tinyldm.backend import Array, array_module, on_host
from tinyldm.nn.pieces import blocks
from tinyldm.nn.protocol import Backward, differentiable

BLOCK_SCORES = 2**17  # scores at a time: 512 KiB of float32


@differentiable
def attention(
    q: Array, k: Array, v: Array, heads: int, causal: bool = False, block: int | None = None
) -> tuple[Array, Backward]:
    """Attend from q (n, l, d) to k (n, m, d), v (n, m, e), each split into `heads` → (n, l, e).

    softmax(q kᵀ / √(d / heads)) v of each head (Vaswani et al. 2017, eq. 1, section 3.2.2).

    `causal`: token i sees tokens 0…i only. `block`: scores at a time, by default what fits the
    cache (or, on a GPU, 64 times that).
    """
    xp = array_module(q)
    n, l, d = q.shape
    m = k.shape[1]
    scale = 1 / math.sqrt(d // heads)
    q_, k_, v_ = (_split_heads(x, heads) for x in (q, k, v))
    block = block or (BLOCK_SCORES if on_host(q) else 64 * BLOCK_SCORES)
    y = xp.empty((n, l, v.shape[2]), q.dtype)
    y_ = _split_heads(y, heads)
    log_sum = xp.empty((n, heads, l, 1), q.dtype)

    def scores(ns, ls):
        s = (q_[ns, :, ls] * scale) @ k_[ns].swapaxes(2, 3)  # (n, heads, l, m)
        if causal:
            hidden = xp.arange(m) > xp.arange(ls.start, ls.stop)[:, None]
            s += xp.where(hidden, -math.inf, 0)
        return s

    for ns, ls in blocks(n, l, heads * m, block):
        s = scores(ns, ls)
        top = s.real.max(axis=3, keepdims=True)  # any shift will do: this one cannot overflow
        s -= top
        p = xp.exp(s)
        total = p.sum(axis=3, keepdims=True)
        y_[ns, :, ls] = (p @ v_[ns]) / total
        log_sum[ns, :, ls] = top + xp.log(total)

    def backward(dy):
        dq, dk, dv = (xp.zeros(x.shape, x.dtype) for x in (q, k, v))
        dq_, dk_, dv_ = (_split_heads(x, heads) for x in (dq, dk, dv))
        dy_ = _split_heads(dy, heads)
        for ns, ls in blocks(n, l, heads * m, block):
            p = scores(ns, ls)
            p -= log_sum[ns, :, ls]
            p = xp.exp(p)
            dy_block = dy_[ns, :, ls]
            dv_[ns] += p.swapaxes(2, 3) @ dy_block
            ds = dy_block @ v_[ns].swapaxes(2, 3)
            ds -= (dy_block * y_[ns, :, ls]).sum(axis=3, keepdims=True)  # = Σ p dp
            ds *= p
            ds *= scale
            dq_[ns, :, ls] = ds @ k_[ns]
            dk_[ns] += ds.swapaxes(2, 3) @ q_[ns, :, ls]
        return dq, dk, dv

    return y, backward


def _split_heads(x, heads):
    """(n, l, d) → (n, heads, l, d / heads), a view."""
    n, l, d = x.shape
    return x.reshape(n, l, heads, d // heads).transpose(0, 2, 1, 3)
