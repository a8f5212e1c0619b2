"""Attention on a GPU; the twin of `nn.attention.attention`.

Scores are made a block at a time, and thrown away, so memory is linear in the tokens. Softmax is
one launch: of a row, a block of threads finds the largest score and the sum. The backward pass
keeps these two, and makes the probabilities of a block again.
"""

import math

from tinyldm.backend import Array, array_module
from tinyldm.kernels.attention import score_blocks
from tinyldm.kernels.cuda.cublas import product
from tinyldm.kernels.cuda.launch import THREADS, WARP, launch, on_gpu
from tinyldm.kernels.registry import kernel
from tinyldm.nn.attention import join_heads, split_heads
from tinyldm.nn.protocol import Backward

BLOCK_SCORES = 2**26  # scores at a time: 256 MiB of float32


@kernel("nn.attention.attention", cost=on_gpu)
def fused_attention(
    q: Array, k: Array, v: Array, heads: int, causal: bool = False
) -> tuple[Array, Backward]:
    """Attend in blocks of BLOCK_SCORES scores."""
    xp = array_module(q)
    (n, l, d), m = q.shape, k.shape[1]
    scale = 1 / math.sqrt(d // heads)
    q, k, v = (xp.ascontiguousarray(split_heads(x, heads)) for x in (q, k, v))
    head_blocks, query_blocks = score_blocks(n, heads, l, m, BLOCK_SCORES)
    work = [(ns, hs, ls) for ns, hs in head_blocks for ls in query_blocks]
    threads = (min(THREADS, -(-m // WARP) * WARP),)

    def scores_of(ns, hs, ls):
        scores = product(q[ns, hs, ls], k[ns, hs].swapaxes(2, 3))
        rows = scores.size // m
        return scores, (rows,), (scale, ls.stop - ls.start, ls.start, m, causal)

    y, stats = xp.empty((*q.shape[:3], v.shape[3]), q.dtype), []
    for ns, hs, ls in work:
        p, rows, options = scores_of(ns, hs, ls)
        stats.append(xp.empty((2, *rows), q.dtype))
        launch("softmax", rows, threads, p, stats[-1], *options)
        product(p, v[ns, hs], y[ns, hs, ls])

    def backward(dy):
        dy = xp.ascontiguousarray(split_heads(dy, heads))
        dq, dk, dv = (xp.empty(x.shape, x.dtype) for x in (q, k, v))
        for (ns, hs, ls), of_rows in zip(work, stats, strict=True):
            p, rows, options = scores_of(ns, hs, ls)
            ds = product(dy[ns, hs, ls], v[ns, hs].swapaxes(2, 3))
            launch("softmax_backward", rows, threads, p, ds, of_rows, *options)
            product(ds, k[ns, hs], dq[ns, hs, ls])
            for scores, x, dx in ((ds, q, dk), (p, dy, dv)):
                product(scores.swapaxes(2, 3), x[ns, hs, ls], dx[ns, hs], add=ls.start > 0)
        return join_heads(dq), join_heads(dk), join_heads(dv)

    return join_heads(y), backward
