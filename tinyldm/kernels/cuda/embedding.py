"""The gradient of an embedding on a GPU, in one order of adding; the twin of `nn.functional`'s."""

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.cuda.launch import each_row
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.nn.protocol import Backward


def _cost(ids, table):
    return -1.0 if not on_host(table) and table.dtype == "float32" else NEVER


@kernel("nn.functional.embedding", cost=_cost)
def deterministic_embedding(ids: Array, table: Array) -> tuple[Array, Backward]:
    """Add up the gradients of an id where it occurs first, and not by atomic additions."""
    xp = array_module(table)

    def backward(dy, weights=True):
        if not weights:
            return None, None
        dtable, d = xp.zeros(table.shape, table.dtype), table.shape[1]
        places = ids.reshape(-1).astype(np.int64) % len(table)  # as `table[ids]` takes them
        each_row("embedding_backward", ids.size, d, places, xp.ascontiguousarray(dy), dtable, d)
        return None, dtable

    return table[ids], backward
