"""Memory for results and scratch memory: aligned, and no more of it than there should be."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.kernels.workspace import ALIGNMENT, UNALIGNED, empty, scratch


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
