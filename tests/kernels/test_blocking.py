"""Pieces of work: all of it, once, and no more of it at a time than asked for."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import in_blocks

from tinyldm.kernels import blocking
from tinyldm.kernels.blocking import (
    WORTH_THREADS,
    blocks,
    cache_blocks,
    each_block,
    on_free_cores,
    shares,
)
from tinyldm.threads import cores, one_blas_thread


def test_blocks_of_both_kinds_cover_everything_once():
    x = np.arange(24).reshape(12, 2)
    for block in (1, 2, 5, 7, 24, 1000):
        with in_blocks(block):
            cut = [a for (a,) in cache_blocks(x)]
        assert np.array_equal(np.concatenate(cut), x)
        assert all(a.size <= max(block, 2) for a in cut)
    for samples, rows, budget in [(3, 4, 1), (3, 4, 7), (3, 4, 20), (3, 4, 59), (3, 4, 1e9)]:
        seen = np.zeros((samples, rows), int)
        for ns, ls in blocks(samples, rows, row_size=5, budget=budget):
            seen[ns, ls] += 1
            assert 5 * (ns.stop - ns.start) * (ls.stop - ls.start) <= max(budget, 5)
        assert (seen == 1).all()


@given(st.lists(st.integers(), min_size=1, max_size=9), st.integers(0, 2 * WORTH_THREADS))
def test_work_is_dealt_out_in_order_and_only_where_it_is_worth_it(work, size):
    for free in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocking, "free_cores", lambda free=free: free)
            dealt = shares(work, size, np.zeros(1))
        assert sum(dealt, []) == work
        assert len(dealt) == (min(free, len(work)) if size >= WORTH_THREADS else 1)
        assert all(dealt)
    assert on_free_cores(lambda x: x + 1, work, size, np.zeros(1)) == [x + 1 for x in work]


def test_blocks_are_on_all_cores_unless_others_share_the_work():
    x = np.zeros((2 * WORTH_THREADS // 1000, 1000))

    def names():
        return set(each_block(lambda block: threading.current_thread().name, x))

    with one_blas_thread():
        assert names() == {threading.current_thread().name}
    if cores() > 1:
        assert threading.current_thread().name not in names()
