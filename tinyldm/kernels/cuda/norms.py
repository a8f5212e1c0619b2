"""Normalisations on a GPU, one launch each way; the twins of those in `nn.norms`."""

from tinyldm.backend import Array, array_module
from tinyldm.kernels.cuda.launch import THREADS, column_sums, launch, on_gpu
from tinyldm.kernels.registry import kernel
from tinyldm.nn.protocol import Backward

MOST_SAMPLES = 512  # blocks for a group on the way back, each with its own sums of dw and db


@kernel("nn.norms.group_norm", cost=on_gpu)
def fused_group_norm(
    x: Array, w: Array, b: Array, groups: int, eps: float
) -> tuple[Array, Backward]:
    """Normalise a group of a sample in each block of threads."""
    return _norm(x, w, b, len(x), groups, eps)


@kernel("nn.norms.group_norm_silu", cost=on_gpu)
def fused_group_norm_silu(
    x: Array, w: Array, b: Array, groups: int, eps: float
) -> tuple[Array, Backward]:
    """Normalise a group of a sample in each block of threads, and apply SiLU."""
    return _norm(x, w, b, len(x), groups, eps, silu=True)


@kernel("nn.norms.layer_norm", cost=on_gpu)
def fused_layer_norm(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Backward]:
    """Normalise a row in each block of threads: a group norm of one group and one position."""
    return _norm(x, w, b, x.size // x.shape[-1], 1, eps)


def _norm(x, w, b, n, groups, eps, silu=False):
    """Normalise the groups of n samples, each over all its positions."""
    xp, c = array_module(x), x.shape[-1]
    p, size = x.size // (n * c), c // groups
    x, w, b = map(xp.ascontiguousarray, (x, w, b))
    y, stats = xp.empty(x.shape, x.dtype), xp.empty((3, n, groups), x.dtype)
    lanes = min(size, THREADS)
    block = lanes, max(1, min(p, THREADS // lanes))
    launch("normalise", (n, groups), block, x, w, b, y, stats, n, p, c, size, eps, silu)

    def backward(dy, weights=True):
        blocks = min(n, MOST_SAMPLES)
        dx, sums = xp.empty(x.shape, x.dtype), xp.empty((blocks, 2 * c), x.dtype)
        launch(
            "normalise_backward", (blocks, groups), block, x, xp.ascontiguousarray(dy), w, b, stats,
            dx, sums, n, p, c, size, silu,
        )  # fmt: skip
        return dx, *(column_sums(sums).reshape(2, c) if weights else (None, None))

    return y, backward
