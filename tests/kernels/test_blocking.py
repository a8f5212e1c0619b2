"""Pieces of work: all of it, once, and no more of it at a time than asked for."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import in_pieces

from tinyldm.backend import cores, one_blas_thread
from tinyldm.nn import pieces as pieces_module
from tinyldm.nn.pieces import (
    ALIGNMENT,
    UNALIGNED,
    WORTH_THREADS,
    blocks,
    each_piece,
    empty,
    on_free_cores,
    pieces,
    product,
    scratch,
    shares,
    spread,
)


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


@given(st.lists(st.integers(), min_size=1, max_size=9), st.integers(0, 2 * WORTH_THREADS))
def test_work_is_dealt_out_in_order_and_only_where_it_is_worth_it(work, size):
    for free in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces_module, "free_cores", lambda free=free: free)
            dealt = shares(work, size, np.zeros(1))
        assert sum(dealt, []) == work
        assert len(dealt) == (min(free, len(work)) if size >= WORTH_THREADS else 1)
        assert all(dealt)
    assert on_free_cores(lambda x: x + 1, work, size, np.zeros(1)) == [x + 1 for x in work]


def test_pieces_are_on_all_cores_unless_others_share_the_work():
    x = np.zeros((2 * WORTH_THREADS // 1000, 1000))

    def names():
        return set(each_piece(lambda piece: threading.current_thread().name, x))

    with one_blas_thread():
        assert names() == {threading.current_thread().name}
    if cores() > 1:
        assert threading.current_thread().name not in names()


@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(["f4", "f8", "c16", "i4"]))
def test_empty_is_aligned_and_of_the_same_kind(shape, dtype):
    for size in (tuple(shape), (UNALIGNED, *shape)):
        x = empty(size, np.zeros(1, dtype))
        assert x.shape == size and x.dtype == dtype and x.flags.c_contiguous
        assert x.ctypes.data % ALIGNMENT == 0 or x.size < UNALIGNED


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.sampled_from(["f4", "f8", "c16"]))
def test_scratch_is_aligned_and_its_arrays_do_not_overlap(sizes, dtype):
    like = np.zeros(1, dtype)
    arrays = scratch(like, *sizes)
    for i, x in enumerate(arrays):
        assert x.shape == (sizes[i],) and x.dtype == dtype
        assert x.ctypes.data % ALIGNMENT == 0 or x.size == 0
        x[...] = i
    assert all((x == i).all() for i, x in enumerate(arrays))


def test_scratch_is_the_same_memory_again_and_another_in_another_thread():
    (first,) = scratch(np.zeros(1), 100)
    (again,) = scratch(np.zeros(1, "f4"), 100)
    with ThreadPoolExecutor(1) as pool:
        (elsewhere,) = pool.submit(scratch, np.zeros(1), 100).result()
    assert np.shares_memory(first, again)
    assert not np.shares_memory(first, elsewhere)


@pytest.mark.parametrize("has_small", [True, False])
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 80),
    st.integers(1, 100),
    st.sampled_from([1, 5, 64, 128]),
    st.booleans(),
    st.booleans(),
)
def test_product_is_the_matrix_product_however_it_is_cut(
    has_small, lead, m, k, n, a_turned, b_turned
):
    rng = np.random.default_rng(m)
    a = rng.standard_normal((*lead, k, m)).swapaxes(-1, -2) if a_turned else None
    a = rng.standard_normal((*lead, m, k)) if a is None else a
    b = rng.standard_normal((*lead, n, k)).swapaxes(-1, -2) if b_turned else None
    b = rng.standard_normal((*lead, k, n)) if b is None else b
    out = np.full((*lead, m, n), np.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "has_small_products", lambda: has_small)
        patch.setattr(pieces_module, "SMALL", 32 * 64 * 20 - 1)  # the limit lies within the sizes
        product(a, b, out)
    assert np.allclose(out, a @ b, rtol=1e-13, atol=1e-13)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 40), st.sampled_from([1, 7, 1024]))
def test_spread_is_the_matrix_product(p, q, n, strip):
    rng = np.random.default_rng(p)
    matrix, x = rng.standard_normal((p, q)), rng.standard_normal((q, n))
    out = np.full((p, n), np.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "STRIPS", (strip, 3))
        spread(matrix, x, out)
    assert np.allclose(out, matrix @ x, rtol=1e-13, atol=1e-13)
