"""Apply a function to images, some at a time; to a large one tile by tile, for less memory."""

from collections.abc import Callable
from functools import partial

import numpy as np

from tinyldm.backend import Array, array_module
from tinyldm.threads import map_batch

ALONE = 2**16  # pixels: a larger image goes through an autoencoder by itself, on all cores
WHOLE, TILE = 768, 512  # pixels: a larger square than the first is worked on in tiles of the second
OVERLAP = 0.25  # of a tile, at least, with each neighbour


def in_parts(
    function: Callable[[Array], Array],
    x: Array,
    grid: tuple[int, int],
    factor: int,
    tile: int | None,
) -> Array:
    """Apply `function` to x (n, h, w, c), images or latents: small ones together, large in tiles.

    grid: (rows, columns) of the latents, `factor` pixels a side each. tile: pixels, the side of a
    tile; 0 never, None where the images are large.
    """
    pixels = grid[0] * grid[1] * factor**2
    if tile is None:
        tile = TILE if pixels > WHOLE**2 else 0
    if tile and max(grid) > tile // factor:
        function = partial(in_tiles, function, grid=grid, side=tile // factor)
    elif pixels <= ALONE:
        return map_batch(function, x)
    return array_module(x).concatenate([function(x[i : i + 1]) for i in range(len(x))])


def in_tiles(
    function: Callable[[Array], Array],
    x: Array,
    grid: tuple[int, int],
    side: int,
) -> Array:
    """Apply `function` to x (n, h, w, c) → (n, h', w', c'), in overlapping tiles, blended.

    grid: (rows, columns) of which h, w, h' and w' are multiples; for an autoencoder the positions
    of its latents. side: of a tile, in such positions. Where tiles overlap, each counts by its
    distance from its own border. What a tile holds does not reach the others: for an autoencoder,
    whose norms and attention see everything, the result is close to the whole but not the same.
    """
    xp = array_module(x)
    step = x.shape[1] // grid[0]  # of x, a position
    y = total = None
    for rows in _spans(grid[0], side):
        for columns in _spans(grid[1], side):
            tile = function(x[:, _scaled(rows, step), _scaled(columns, step)])
            scale = tile.shape[1] // (rows.stop - rows.start)
            if y is None:
                sides = (grid[0] * scale, grid[1] * scale)
                y = xp.zeros((len(x), *sides, tile.shape[3]), tile.dtype)
                total = xp.zeros((*sides, 1), tile.dtype)
            weights = np.outer(_ramp(rows, grid[0], scale), _ramp(columns, grid[1], scale))
            weights = xp.asarray(weights[..., None].astype(tile.dtype))
            place = _scaled(rows, scale), _scaled(columns, scale)
            y[:, *place] += weights * tile
            total[place] += weights
    y /= total
    return y


def _spans(length, side):
    """Return slices of `side`, or of all there is, evenly spaced from end to end."""
    side = min(side, length)
    most = max(1, int(side * (1 - OVERLAP)))  # from the start of one to the next
    count = 1 + -(-(length - side) // most)
    starts = np.round(np.linspace(0, length - side, count)).astype(int).tolist()
    return [slice(start, start + side) for start in starts]


def _scaled(span, scale):
    return slice(span.start * scale, span.stop * scale)


def _ramp(span, length, scale):
    """Return weights along one axis, rising from the tile's border, but not at the image's own."""
    size = (span.stop - span.start) * scale
    i = np.arange(size) + 0.5
    rise = np.full(size, np.inf)
    if span.start > 0:
        rise = np.minimum(rise, i)
    if span.stop < length:
        rise = np.minimum(rise, size - i)
    return np.minimum(rise / (OVERLAP * size), 1)
