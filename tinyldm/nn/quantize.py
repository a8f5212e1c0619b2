"""Vector quantisation: each vector becomes the nearest of a codebook (van den Oord et al. 2017).

Shapes: z (..., d), codebook (k, d), codes (...) integers. The choice of a code has no gradient;
the gradient of the result is passed on unchanged instead ("straight through"). The stop-gradient
of a formula, its `sg`, is the real part here: the same for real numbers, and for the complex-step
derivative of `check_gradients` exactly a constant.
"""

from tinyldm.backend import Array, array_module
from tinyldm.nn import functional as F
from tinyldm.nn.protocol import Backward, differentiable, replaceable


@replaceable
def nearest_codes(z: Array, codebook: Array) -> Array:
    """Return the row of the codebook nearest to each vector; of those equal to rounding, any one.

    |z − e|² = |z|² − 2 z·e + |e|², of which |z|² is the same for every e. Both are taken from the
    middle of the codebook, as differences of large numbers would lose their digits.
    """
    middle = codebook.real.mean(axis=0)
    vectors, table = z.real.reshape(-1, z.shape[-1]) - middle, codebook.real - middle
    distances = 0.5 * (table * table).sum(axis=1) - vectors @ table.T
    return array_module(z).argmin(distances, axis=1).reshape(z.shape[:-1])


@differentiable
def straight_through(z: Array, codebook: Array, codes: Array) -> tuple[Array, Backward]:
    """Straight-through quantisation z + sg(codebook[codes] − z), with the gradient of z.

    backward(dy) → dz; the codebook learns from `codebook_loss` alone.
    """
    y = z + (codebook[codes] - z).real

    def backward(dy):
        return dy

    return y, backward


@differentiable
def codebook_loss(
    z: Array, codebook: Array, codes: Array, commitment: float = 0.25
) -> tuple[Array, Backward]:
    """Codebook loss: mean (e − sg z)² + commitment · mean (sg e − z)², e = codebook[codes].

    van den Oord et al. 2017, eq. 3; `sg` stops the gradient. backward(dloss) → dz, dcodebook.
    """
    e, embedding_back = F.embedding(codes, codebook)
    towards_z, towards_e = e - z.real, z - e.real
    loss = (towards_z * towards_z).mean() + commitment * (towards_e * towards_e).mean()

    def backward(dloss=1.0, weights=True):
        dz = (2 * commitment / z.size) * dloss * towards_e
        if not weights:
            return dz, None
        return dz, embedding_back((2 / z.size) * dloss * towards_z)[1]

    return loss, backward


def perplexity(codes: Array, count: int) -> float:
    """Perplexity of the codes in use: e^entropy of their frequencies, 1…count."""
    xp = array_module(codes)
    share = xp.bincount(codes.reshape(-1), minlength=count) / codes.size
    return float(xp.exp(-(share * xp.log(xp.maximum(share, 1e-30))).sum()))
