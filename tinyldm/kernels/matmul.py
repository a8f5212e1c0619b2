"""Matrix products in the shapes that BLAS multiplies fastest.

OpenBLAS copies both matrices into an order of its own before it multiplies them, except where
m·n·k is at most 10⁶ and the processor has AVX-512. Among many products of middling size those
copies cost up to half the time, and `matmul` makes any number of smaller ones in one call.
"""

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.workspace import empty
from tinyldm.threads import has_small_products

SMALL = 10**6
TILE = (32, 64)  # rows and columns of a small product
PANEL = 2**14  # elements of a right-hand matrix that stays in the first-level cache, nearly
LEAST_ROWS = 64  # with no more, copying the right-hand matrix takes longest: k is halved
FEW = 256  # rows too few to be worth copying the matrices
STRIPS = (1024, 768)  # columns at a time of a product with very few rows


def product(a: Array, b: Array, out: Array) -> None:
    """Compute out = a b, for a (..., m, k), b (..., k, n), out (..., m, n), equal leading axes."""
    if a.ndim > 2 and _too_long(*a.shape[-2:], b.shape[-1], a):
        middle = a.shape[-1] // 2
        product(a[..., :middle], b[..., :middle, :], out)
        rest = empty(out.shape, out)
        product(a[..., middle:], b[..., middle:, :], rest)
        out += rest
        return
    if a.ndim == 2 or not _tiled(*a.shape[-2:], b.shape[-1], a):
        array_module(a).matmul(a, b, out=out)
        return
    *lead, m, k = a.shape
    n = b.shape[-1]
    rows, columns = _tile(k, n)
    end = m - m % rows
    b = np.ascontiguousarray(b)  # small products are slow with a transposed matrix
    # Cutting an axis in two never copies, so what is written to these views is written to `out`.
    np.matmul(
        a[..., :end, :].reshape(*lead, end // rows, 1, rows, k),
        b.reshape(*lead, 1, k, n // columns, columns).swapaxes(-3, -2),
        out=out[..., :end, :].reshape(*lead, -1, rows, n // columns, columns).swapaxes(-3, -2),
    )
    if end < m:
        np.matmul(a[..., end:, :], b, out=out[..., end:, :])


def _too_long(m, k, n, like):
    """Return whether to halve k: halves are small products, the whole is not, and m is few rows."""
    return (
        m <= LEAST_ROWS
        and n <= TILE[1]
        and TILE[0] // 2 * min(n, TILE[1]) * k > SMALL
        and on_host(like)
        and has_small_products()
    )


def _tile(k, n):
    return TILE[0] if TILE[0] * TILE[1] * k <= SMALL else TILE[0] // 2, min(n, TILE[1])


def _tiled(m, k, n, like):
    rows, columns = _tile(k, n)
    return (
        m * n * k > SMALL >= rows * columns * k
        and (k * n <= PANEL or m <= FEW and k * n <= 8 * PANEL)
        and n % columns == 0
        and on_host(like)
        and has_small_products()
    )


def spread(matrix: Array, x: Array, out: Array) -> None:
    """Compute out = matrix x, for a small matrix (p, q), x (q, n), out (p, n)."""
    n = x.shape[1]
    strip = next((strip for strip in STRIPS if n % strip == 0), STRIPS[0])
    end = n - n % strip if on_host(x) else 0
    if end:
        x_, out_ = (z[:, :end].reshape(len(z), -1, strip).swapaxes(0, 1) for z in (x, out))
        np.matmul(matrix, x_, out=out_)
    if end < n:
        array_module(x).matmul(matrix, x[:, end:], out=out[:, end:])
