"""A 3×3 convolution with few multiplications, by Winograd's algorithm.

F(m×m, 3×3) of Winograd 1980, as in Lavin & Gray 2015, section 4.1. A tile is a window of
(m + 2)×(m + 2) pixels of x, the next one m pixels on; it gives m×m outputs. With ⊙ the product
of equal places (summed over c_in, one matrix product a place),

    y = Aᵀ [(Bᵀ x B) ⊙ (G w Gᵀ)] A        dw = Gᵀ [(Bᵀ x B) ⊙ (A dy Aᵀ)] G

On tiles laid out flat Bᵀ x B is the matrix Bᵀ ⊗ Bᵀ times x, and the same for the rest.

A convolution is a product of polynomials, which is known from its values at m + 2 points, ∞ among
them: G w and A dy are such values, and B leads back from them.

Bytes of transformed kernels are many times those of the kernel. Where one block holds all tiles,
the kernels are made and used for some of the outputs' channels at a time.
"""

import functools

import numpy as np

from tinyldm.backend import Array, array_module, map_threads, on_host
from tinyldm.nn.pieces import empty, product, scratch, shares, spread
from tinyldm.nn.windows import cut, windows

POINTS = {2: (0, 1, -1), 4: (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}  # ±p, ±1/p keep the rounding small

# Bytes at a time, on the CPU: what a core's cache holds, about.
BLOCK_BYTES = 2**20  # of tiles
WEIGHT_BLOCK_BYTES = 2**20  # the same in the pass to dw, where each block adds to dw
KERNEL_BYTES = 2**22  # of transformed kernels
LEAST_TILES = 128  # in a block: products of fewer rows wait for the kernels
LEAST_COLUMNS = 64  # of kernels: those of fewer wait for the tiles


def winograd(
    x: Array,
    w: Array,
    b: Array | None,
    padding: tuple[int, int, int, int],
    outputs: tuple[int, int, int],
    m: int,
) -> Array:
    """Convolve x (n, h, w, c_in) with w (3, 3, c_in, c_out), b (c_out,) → y of `outputs` (n, h', w')."""
    c_in, c_out = w.shape[2:]
    n, out_h, out_w = outputs
    places, grid = (m + 2) ** 2, (-(-out_h // m), -(-out_w // m))
    y = empty((n, m * grid[0], m * grid[1], c_out), x)
    squares = _squares(y, m)
    dealt = _cut_tiles(n, grid, places * c_in * x.itemsize, BLOCK_BYTES, x)
    everything = [slice(0, c_out)]
    if len(dealt) == len(dealt[0]) == 1:
        columns = shares(_columns(places, w, x), places * c_in * c_out, x)
        work = [(dealt[0], some) for some in columns]
    else:
        work = [(blocks, everything) for blocks in dealt]
    kernels = _kernels(w, m, empty((places, c_in, c_out), x)) if work[0][1] == everything else None

    def part(share):
        blocks, columns = share
        width = columns[0].stop - columns[0].start
        for ns, hs, seen in windows(x, (m + 2, m + 2), m, padding, grid[1], blocks):
            count = seen.size // (places * c_in)
            size = places * count * max(c_in, width)
            tiles, spare, kernel, result = scratch(
                x,
                size,
                size,
                0 if kernels is not None else places * c_in * width,
                m * m * count * width,
            )
            _tiles(seen, m, spare, tiles)
            tiles_ = tiles[: seen.size].reshape(places, count, c_in)
            for ks in columns:
                width = ks.stop - ks.start
                if kernels is None:
                    kernels_ = kernel[: places * c_in * width].reshape(places, c_in, width)
                    _kernels(w[..., ks], m, kernels_)
                else:
                    kernels_ = kernels
                products = spare[: places * count * width].reshape(places, count, width)
                product(tiles_, kernels_, products)
                block = squares[:, :, ns, hs, :, ks]
                out = (tiles if kernels is not None else result)[: block.size]
                _transform("output", m, products, out)
                if b is None:
                    block[...] = out.reshape(block.shape)
                else:
                    array_module(x).add(out.reshape(block.shape), b[ks], out=block)

    map_threads(part, work)
    return y if (out_h, out_w) == y.shape[1:3] else y[:, :out_h, :out_w].copy()


def weight_gradient(x: Array, dy: Array, padding: tuple[int, int, int, int], m: int) -> Array:
    """The gradient of the kernel (3, 3, c_in, c_out)."""
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

    dealt = _cut_tiles(n, grid, places * c_in * x.itemsize, WEIGHT_BLOCK_BYTES, x)
    dkernels, *others = map_threads(part, dealt)
    for other in others:
        dkernels += other
    dw = empty((3, 3, c_in, c_out), x)
    _transform("dkernel", m, dkernels, dw)
    return dw


def _cut_tiles(n, grid, tile_bytes, budget, like):
    return cut(n, grid[0], grid[1] * tile_bytes, max(budget, LEAST_TILES * tile_bytes), like)


def _columns(places, w, like):
    """The outputs' channels in runs whose transformed kernels stay in the cache."""
    c_in, c_out = w.shape[2:]
    step = max(1, KERNEL_BYTES // (LEAST_COLUMNS * places * c_in * like.itemsize)) * LEAST_COLUMNS
    if not on_host(like):
        step = c_out
    return [slice(k, min(k + step, c_out)) for k in range(0, c_out, step)]


def _squares(y, m):
    """y (n, m i, m j, c) → its m×m squares, the places in them first: (m, m, n, i, j, c), a view."""
    n, h, w, c = y.shape
    return y.reshape(n, h // m, m, w // m, m, c).transpose(2, 4, 0, 1, 3, 5)


def _tiles(seen, m, spare, tiles):
    """Windows [n, y, x, i, j, c] → Bᵀ x B of each, the places (i, j) first, in `tiles`."""
    taps_first = seen.transpose(3, 4, 0, 1, 2, 5)
    spare = spare[: seen.size]
    spare.reshape(taps_first.shape)[...] = taps_first
    _transform("input", m, spare, tiles[: seen.size])


def _kernels(w, m, out):
    """w (3, 3, c_in, c_out) → G w Gᵀ (places, c_in, c_out), in `out`."""
    _transform("kernel", m, array_module(w).ascontiguousarray(w), out)
    return out


def _transform(name, m, x, out):
    """out = M ⊗ M x, for x whose first numbers run over the places of a tile, square or kernel."""
    matrix = _transform_matrix(name, m, array_module(x), x.dtype.name)
    spread(matrix, x.reshape(matrix.shape[1], -1), out.reshape(matrix.shape[0], -1))


@functools.cache
def _transform_matrix(name, m, xp, dtype):
    def values(degree):  # of 1, z, z², … at the points; at ∞ of the highest alone
        highest = np.arange(degree) == degree - 1
        return np.vstack([np.vander(POINTS[m], degree, increasing=True), highest])

    a, g, b_t = values(m), values(3), np.linalg.inv(values(m + 2)).T
    matrix = {"input": b_t, "kernel": g, "output": a.T, "dkernel": g.T, "doutput": a}[name]
    return xp.asarray(np.kron(matrix, matrix).astype(dtype))
