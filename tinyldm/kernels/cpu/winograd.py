"""3×3 convolution with few multiplications, Winograd's algorithm; a kernel of `nn.conv.conv2d`.

F(m×m, 3×3) of Winograd 1980, as in Lavin & Gray 2015, section 4.1. A tile is a window of
(m + 2)×(m + 2) pixels of x, the next one m pixels on; it gives m×m outputs. With ⊙ the product
of equal places (summed over c_in, one matrix product a place),

    y = Aᵀ [(Bᵀ x B) ⊙ (G w Gᵀ)] A        dw = Gᵀ [(Bᵀ x B) ⊙ (A dy Aᵀ)] G

On tiles laid out flat Bᵀ x B is the matrix Bᵀ ⊗ Bᵀ times x, and the same for the rest.

A convolution is a product of polynomials, which is known from its values at m + 2 points, ∞ among
them: G w and A dy are such values, and B leads back from them. With m = 4 float32 keeps about 3e-6
of the largest output, with m = 2 about 1e-6, as the direct sum does (see its tests).

Transformed kernels take several times the memory of the kernel. Where one block holds all tiles,
the kernels are transformed and used for some of the output channels at a time.
"""

import functools
import math

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.blocking import add_to_rows, shares
from tinyldm.kernels.matmul import product, spread
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.kernels.windows import bias_gradient, cut, turned_kernel, windows
from tinyldm.kernels.workspace import empty, scratch
from tinyldm.nn.conv import Padding, output_shape
from tinyldm.nn.protocol import Backward
from tinyldm.threads import map_threads

POINTS = {2: (0, 1, -1), 4: (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}  # ±p, ±1/p keep the rounding small

# Bytes at a time, on the CPU: what a core's cache holds, about.
BLOCK_BYTES = 2**20  # of tiles
WEIGHT_BLOCK_BYTES = 2**20  # the same in the pass to dw, where each block adds to dw
KERNEL_BYTES = 2**22  # of transformed kernels
LEAST_TILES = 128  # in a block: products of fewer rows wait for the kernels
LEAST_COLUMNS = 64  # of kernels: those of fewer wait for the tiles
LEAST_CHANNELS = 32  # of input and output: with fewer the transforms take longest


@functools.lru_cache(maxsize=4096)
def _cost(m, x, w, stride, padding):
    """Estimate the cost, by measurements of 3×3 kernels on one core (`python -m bench conv`)."""
    c_in, c_out = w[2:]
    if w[:2] != (3, 3) or stride != 1 or min(c_in, c_out) < LEAST_CHANNELS:
        return NEVER
    n, out_h, out_w, _ = output_shape(x, w, stride, padding)
    tiles = n * -(-out_h // m) * -(-out_w // m)
    of_kernel = 24  # the tiles whose products take as long as the transform of the kernel
    products = (tiles + of_kernel) * (m + 2) ** 2 * c_in * c_out
    return products + tiles * m * m * 140 * (c_in + c_out) + 1.5e6


def _convolution(m):
    """Make the kernel with tiles of m×m outputs."""

    def cost(x, w, b=None, stride=1, padding=1):
        if w.shape[0] != 3 or not on_host(x):
            return NEVER
        return _cost(m, x.shape, w.shape, stride, padding)

    def convolve(
        x: Array, w: Array, b: Array | None = None, stride: int = 1, padding: Padding = 1
    ) -> tuple[Array, Backward]:
        """Convolve with a 3×3 kernel at stride 1, all three passes in tiles."""
        *outputs, padding = output_shape(x.shape, w.shape, stride, padding)
        if x.dtype != w.dtype:  # as where a gradient check makes the weights complex, not the data
            x = x.astype(np.result_type(x.dtype, w.dtype))
        y = winograd(x, w, b, padding, outputs, m)

        def backward(dy, weights=True):
            dw = db = None
            if weights:
                dw, db = weight_gradient(x, dy, padding, m), bias_gradient(b, dy)
            turned, around = turned_kernel(w, padding)
            return winograd(dy, turned, None, around, x.shape[:3], m), dw, db

        return y, backward

    convolve.__name__ = f"winograd{m}"
    return kernel("nn.conv.conv2d", cost=cost)(convolve)


CONVOLUTIONS = {m: _convolution(m) for m in POINTS}


def winograd(
    x: Array,
    w: Array,
    b: Array | None,
    padding: tuple[int, int, int, int],
    outputs: tuple[int, int, int],
    m: int,
) -> Array:
    """Convolve x (n, h, w, c_in) with w (3, 3, c_in, c_out), b (c_out,) → y (n, h', w', c_out).

    padding: zeros (top, bottom, left, right). outputs: (n, h', w'). m: side of a tile's outputs.
    """
    c_in, c_out = w.shape[2:]
    n, out_h, out_w = outputs
    places, grid = (m + 2) ** 2, (-(-out_h // m), -(-out_w // m))
    y = empty((n, m * grid[0], m * grid[1], c_out), x)
    squares = _squares(y, m)
    dealt, all_columns = _cut_tiles(n, grid, places, x, BLOCK_BYTES), [slice(0, c_out)]
    work = [(blocks, all_columns) for blocks in dealt]
    if len(dealt) == len(dealt[0]) == 1:
        columns = shares(_columns(places, w, x), places * c_in * c_out, x)
        work = [(dealt[0], some) for some in columns]
    all_kernels = _kernels(w, m) if work[0][1] == all_columns else None

    def part(share):
        blocks, columns = share
        width = columns[0].stop - columns[0].start
        for ns, hs, seen in windows(x, (m + 2, m + 2), m, padding, grid[1], blocks):
            count = seen.size // (places * c_in)
            tiles, spare, kernels, result = scratch(
                x,
                places * count * c_in,
                places * count * max(c_in, width),
                places * c_in * width if all_kernels is None else 0,
                m * m * count * width,
            )
            _tiles(seen, m, spare, tiles)
            for ks in columns:
                some = _kernels(w[..., ks], m, kernels) if all_kernels is None else all_kernels
                products = spare[: places * count * some.shape[2]].reshape(places, count, -1)
                product(tiles.reshape(places, count, c_in), some, products)
                block = squares[:, :, ns, hs, :, ks]
                out = result[: block.size]
                _transform("output", m, products, out)
                out = out.reshape(block.shape)
                if b is not None:
                    add_to_rows(out, b[ks])
                block[...] = out

    map_threads(part, work)
    return y if (out_h, out_w) == y.shape[1:3] else y[:, :out_h, :out_w].copy()


def weight_gradient(x: Array, dy: Array, padding: tuple[int, int, int, int], m: int) -> Array:
    """Compute dw (3, 3, c_in, c_out) from x (n, h, w, c_in) and dy (n, h', w', c_out)."""
    n, out_h, out_w, c_out = dy.shape
    c_in = x.shape[3]
    places, grid = (m + 2) ** 2, (-(-out_h // m), -(-out_w // m))
    if out_h % m or out_w % m:
        whole = array_module(dy).zeros((n, m * grid[0], m * grid[1], c_out), dy.dtype)
        whole[:, :out_h, :out_w] = dy
        dy = whole
    squares = _squares(dy, m)

    def part(blocks):
        dkernels = None
        for ns, hs, seen in windows(x, (m + 2, m + 2), m, padding, grid[1], blocks):
            block = squares[:, :, ns, hs]
            count = seen.size // (places * c_in)
            tiles, spare, dproducts = scratch(
                x, seen.size, max(seen.size, block.size), places * count * c_out
            )
            _tiles(seen, m, spare, tiles)
            doutputs = spare[: block.size]
            doutputs.reshape(block.shape)[...] = block
            _transform("doutput", m, doutputs, dproducts)
            more = empty((places, c_in, c_out), x)
            tiles_t = tiles.reshape(places, count, c_in).swapaxes(1, 2)
            product(tiles_t, dproducts.reshape(places, count, c_out), more)
            if dkernels is None:
                dkernels = more
            else:
                dkernels += more
        return dkernels

    dealt = _cut_tiles(n, grid, places, x, WEIGHT_BLOCK_BYTES)
    dkernels, *others = map_threads(part, dealt)
    for other in others:
        dkernels += other
    dw = empty((3, 3, c_in, c_out), x)
    _transform("dkernel", m, dkernels, dw)
    return dw


def _cut_tiles(n, grid, places, x, block_bytes):
    tile_bytes = places * x.shape[3] * x.itemsize
    return cut(n, grid[0], grid[1] * tile_bytes, max(block_bytes, LEAST_TILES * tile_bytes), x)


def _columns(places, w, like):
    """Cut the output channels into runs whose transformed kernels stay in the cache."""
    c_in, c_out = w.shape[2:]
    step = max(1, KERNEL_BYTES // (LEAST_COLUMNS * places * c_in * like.itemsize)) * LEAST_COLUMNS
    if not on_host(like):
        step = c_out
    return [slice(k, min(k + step, c_out)) for k in range(0, c_out, step)]


def _squares(y, m):
    """View y (n, m i, m j, c) as m×m squares, their places first: (m, m, n, i, j, c)."""
    n, h, w, c = y.shape
    return y.reshape(n, h // m, m, w // m, m, c).transpose(2, 4, 0, 1, 3, 5)


def _tiles(seen, m, spare, tiles):
    """Transform windows [n, y, x, i, j, c] to Bᵀ x B each, the places (i, j) first, in `tiles`."""
    taps_first = seen.transpose(3, 4, 0, 1, 2, 5)
    spare = spare[: seen.size]
    spare.reshape(taps_first.shape)[...] = taps_first
    _transform("input", m, spare, tiles[: seen.size])


def _kernels(w, m, memory=None):
    """Transform w (3, 3, c_in, c_out) → G w Gᵀ (places, c_in, c_out), at the start of `memory`."""
    shape = ((m + 2) ** 2, *w.shape[2:])
    out = empty(shape, w) if memory is None else memory[: math.prod(shape)].reshape(shape)
    _transform("kernel", m, array_module(w).ascontiguousarray(w), out)
    return out


def _transform(name, m, x, out):
    """Compute out = (M ⊗ M) x; the first axes of x are the places of a tile, square or kernel."""
    matrix = _transform_matrix(name, m, array_module(x), x.dtype.char)
    spread(matrix, x.reshape(matrix.shape[1], -1), out.reshape(matrix.shape[0], -1))


@functools.cache
def _transform_matrix(name, m, xp, dtype):
    def values(degree):  # of 1, z, z², … at the points; at ∞ of the highest alone
        highest = np.arange(degree) == degree - 1
        return np.vstack([np.vander(POINTS[m], degree, increasing=True), highest])

    a, g, b_t = values(m), values(3), np.linalg.inv(values(m + 2)).T
    matrix = {"input": b_t, "kernel": g, "output": a.T, "dkernel": g.T, "doutput": a}[name]
    return xp.asarray(np.kron(matrix, matrix).astype(dtype))
