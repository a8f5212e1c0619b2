"""Nearest codes in blocks of vectors, on any device; the twin of `nn.quantize.nearest_codes`.

On a GPU the products are cuBLAS's, which a graph can hold.
"""

from tinyldm.backend import Array, array_module
from tinyldm.kernels.cuda.cublas import product
from tinyldm.kernels.cuda.launch import on_gpu
from tinyldm.kernels.registry import NEVER, kernel

BLOCK_DISTANCES = 2**22  # at a time: of a block of vectors from all of the codebook


def _cost(z, codebook):
    many = z.size // z.shape[-1] * len(codebook) > BLOCK_DISTANCES
    return 0.0 if many or on_gpu(z, codebook) < NEVER else NEVER


@kernel("nn.quantize.nearest_codes", cost=_cost)
def nearest_codes(z: Array, codebook: Array) -> Array:
    """Find the nearest codes, BLOCK_DISTANCES distances at a time, for less memory."""
    xp = array_module(z)
    middle = codebook.real.mean(axis=0)
    vectors, table = z.real.reshape(-1, z.shape[-1]) - middle, codebook.real - middle
    lengths = 0.5 * (table * table).sum(axis=1)
    block = max(1, BLOCK_DISTANCES // len(table))
    multiply = product if on_gpu(z, codebook) < NEVER else xp.matmul
    codes = [
        xp.argmin(lengths - multiply(vectors[i : i + block], table.T), axis=1)
        for i in range(0, len(vectors), block)
    ]
    return xp.concatenate(codes).reshape(z.shape[:-1])
