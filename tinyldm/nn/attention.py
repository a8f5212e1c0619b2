"""Scaled dot-product attention: softmax(q kᵀ / √d) v."""

import math

from tinyldm.backend import Array, array_module
from tinyldm.nn.protocol import Backward, differentiable


@differentiable
def attention(
    q: Array, k: Array, v: Array, heads: int, causal: bool = False
) -> tuple[Array, Backward]:
    """Attend from q (n, l, d) to k (n, m, d), v (n, m, e), each split into `heads` → (n, l, e).

    softmax(q kᵀ / √(d / heads)) v of each head (Vaswani et al. 2017, eq. 1, section 3.2.2).
    `causal`: token i attends to tokens 0…i only.

    Backward, for each head, with probabilities p and y = p v:

        dv = pᵀ dy     dp = dy vᵀ     ds = p (dp − Σ p dp)     dq = ds k / √d     dk = dsᵀ q / √d
    """
    xp = array_module(q)
    scale = 1 / math.sqrt(q.shape[2] // heads)
    q, k, v = split_heads(q * scale, heads), split_heads(k, heads), split_heads(v, heads)
    scores = q @ k.swapaxes(2, 3)  # (n, heads, l, m)
    if causal:
        l, m = scores.shape[2:]
        scores += xp.where(xp.arange(m) > xp.arange(l)[:, None], -math.inf, 0)
    powers = xp.exp(scores - scores.real.max(axis=3, keepdims=True))  # so that none overflows
    p = powers / powers.sum(axis=3, keepdims=True)

    def backward(dy):
        dy = split_heads(dy, heads)
        dv = p.swapaxes(2, 3) @ dy
        dp = dy @ v.swapaxes(2, 3)
        # Raising one score lowers the share of all others: hence the sum.
        ds = p * (dp - (p * dp).sum(axis=3, keepdims=True))
        dq, dk = ds @ k * scale, ds.swapaxes(2, 3) @ q
        return join_heads(dq), join_heads(dk), join_heads(dv)

    return join_heads(p @ v), backward


def split_heads(x: Array, heads: int) -> Array:
    """Reshape (n, l, d) → (n, heads, l, d / heads), a view where x allows it."""
    n, l, d = x.shape
    return x.reshape(n, l, heads, d // heads).transpose(0, 2, 1, 3)


def join_heads(x: Array) -> Array:
    """Reshape (n, heads, l, d / heads) → (n, l, d), the inverse of `split_heads`."""
    n, heads, l, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(n, l, heads * d)
