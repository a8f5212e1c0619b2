"""Windows: what is seen of an image is that of a padded copy, and every output is there once."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from tinyldm.kernels.windows import cut, windows

sizes = st.integers(1, 7)


@given(
    st.tuples(st.integers(1, 3), sizes, sizes, st.integers(1, 2)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(1, 3),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.integers(1, 2000),
)
def test_windows_are_those_of_a_padded_copy(shape, kernel, stride, padding, budget):
    x = 1 + np.arange(np.prod(shape), dtype=float).reshape(shape)
    top, bottom, left, right = padding
    padded = np.pad(x, [(0, 0), (top, bottom), (left, right), (0, 0)])
    assume(padded.shape[1] >= kernel[0] and padded.shape[2] >= kernel[1])
    out_h = (padded.shape[1] - kernel[0]) // stride + 1
    out_w = (padded.shape[2] - kernel[1]) // stride + 1
    row_bytes = out_w * kernel[0] * kernel[1] * shape[3] * x.itemsize
    times_seen = np.zeros((len(x), out_h), int)
    for blocks in cut(len(x), out_h, row_bytes, budget, x):
        for ns, hs, seen in windows(x, kernel, stride, padding, out_w, blocks):
            times_seen[ns, hs] += 1
            for n, row, column in np.ndindex(seen.shape[:3]):
                top_row, first = (hs.start + row) * stride, column * stride
                expected = padded[
                    ns.start + n, top_row : top_row + kernel[0], first : first + kernel[1]
                ]
                np.testing.assert_array_equal(seen[n, row, column], expected)
    assert (times_seen == 1).all()
