"""Attention on a GPU; the twin of `nn.attention.attention`.

Scores are made a block at a time, and thrown away, so memory is linear in the tokens. Softmax is
one launch: of a row, a block of threads finds the largest score and the sum. The backward pass
keeps these two, and makes the probabilities of a block again.

CuPy copies matrices of a batch that do not lie row by row. So what is transposed are q, k, v and
their gradients, never the scores: dkᵀ = qᵀ ds instead of dk = dsᵀ q.
"""

import math

from tinyldm.backend import Array, array_module
from tinyldm.kernels.attention import score_blocks
from tinyldm.kernels.cuda.launch import THREADS, launch, on_gpu
from tinyldm.kernels.registry import kernel
from tinyldm.nn.attention import join_heads, split_heads
from tinyldm.nn.protocol import Backward

BLOCK_SCORES = 2**26  # scores at a time: 256 MiB of float32
WARP = 32  # threads that run together


@kernel("nn.attention.attention", cost=on_gpu)
def fused_attention(
    q: Array, k: Array, v: Array, heads: int, causal: bool = False
) -> tuple[Array, Backward]:
    """Attend in blocks of BLOCK_SCORES scores."""
    xp = array_module(q)
    (n, l, d), m = q.shape, k.shape[1]
    scale = 1 / math.sqrt(d // heads)
    q, k, v = (split_heads(x, heads) for x in (q, k, v))  # (n, heads, tokens, features)
    queries, keys_t, values = map(xp.ascontiguousarray, (q, k.swapaxes(2, 3), v))
    head_blocks, query_blocks = score_blocks(n, heads, l, m, BLOCK_SCORES)
    work = [(ns, hs, ls) for ns, hs in head_blocks for ls in query_blocks]
    threads = (min(THREADS, -(-m // WARP) * WARP),)

    def scores_of(ns, hs, ls):
        scores = queries[ns, hs, ls] @ keys_t[ns, hs]
        rows = scores.size // m
        return scores, (rows,), (scale, ls.stop - ls.start, ls.start, m, causal)

    y, stats = xp.empty((*q.shape[:3], v.shape[3]), q.dtype), []
    for ns, hs, ls in work:
        p, rows, options = scores_of(ns, hs, ls)
        stats.append(xp.empty((2, *rows), q.dtype))
        launch("softmax", rows, threads, p, stats[-1], *options)
        xp.matmul(p, values[ns, hs], out=y[ns, hs, ls])

    def backward(dy):
        dy = split_heads(dy, heads)
        keys, dys = xp.ascontiguousarray(k), xp.ascontiguousarray(dy)
        queries_t, values_t, dys_t = (
            xp.ascontiguousarray(x.swapaxes(2, 3)) for x in (queries, values, dys)
        )
        dqs, dks_t, dvs_t = (xp.empty(x.shape, x.dtype) for x in (q, keys_t, values_t))
        for (ns, hs, ls), of_rows in zip(work, stats, strict=True):
            p, rows, options = scores_of(ns, hs, ls)
            ds = dys[ns, hs, ls] @ values_t[ns, hs]
            launch("softmax_backward", rows, threads, p, ds, of_rows, *options)
            xp.matmul(ds, keys[ns, hs], out=dqs[ns, hs, ls])
            for a_t, b, sum_t in ((queries_t, ds, dks_t), (dys_t, p, dvs_t)):
                if ls.start == 0:
                    xp.matmul(a_t[ns, hs, :, ls], b, out=sum_t[ns, hs])
                else:
                    sum_t[ns, hs] += a_t[ns, hs, :, ls] @ b
        dks, dvs = (x.swapaxes(2, 3) for x in (dks_t, dvs_t))
        return join_heads(dqs), join_heads(dks), join_heads(dvs)

    return join_heads(y), backward
