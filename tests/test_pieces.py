"""Pieces of work: all of it, once, and no more of it at a time than asked for."""

import numpy as np
from strategies import in_pieces

from tinyldm.nn.pieces import blocks, pieces


def test_pieces_and_blocks_cover_everything_once():
    x = np.arange(24).reshape(12, 2)
    for piece in (1, 2, 5, 7, 24, 1000):
        with in_pieces(piece):
            cut = [a for (a,) in pieces(x)]
        assert np.array_equal(np.concatenate(cut), x)
        assert all(a.size <= max(piece, 2) for a in cut)
    for samples, rows, budget in [(3, 4, 1), (3, 4, 7), (3, 4, 20), (3, 4, 59), (3, 4, 1e9)]:
        seen = np.zeros((samples, rows), int)
        for ns, ls in blocks(samples, rows, row_size=5, budget=budget):
            seen[ns, ls] += 1
            assert 5 * (ns.stop - ns.start) * (ls.stop - ls.start) <= max(budget, 5)
        assert (seen == 1).all()
