"""Launches of kernels that a step makes on a GPU: limits of their number, and how they count."""

import numpy as np
import pytest
import strict

from tests.launches import CASES, kernels

MOST = {  # a tenth above what they are: kernel by kernel, and as a graph
    "the demo's sampling step, batch 1": (320, 21),
    "its train step, U-Net and text": (970, 7),
    "its train step, autoencoder": (300, 5),
    "clip, AdamW, average": (18, 18),
    "Muon, average": (154, 154),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_starts_few_kernels(name):
    with kernels(fused=True):
        now = CASES[name]()
    for count, most in zip(now, MOST[name], strict=True):
        assert most / 2 < count <= most  # a limit that is far away would notice nothing


COUNTED = {  # what CuPy 14 launches for it
    "a sum of two arrays": (1, lambda x: x + x),
    "a view": (0, lambda x: x.T[1:, None].swapaxes(0, 1)),
    "a reshape of what lies row by row": (0, lambda x: x.reshape(-1)),
    "a reshape of a transpose": (1, lambda x: x.T.reshape(-1)),
    "to the dtype that it has": (0, lambda x: x.astype("float32", copy=False)),
    "nothing": (0, lambda x: x[:0] + x[:0]),
    "a sum to one number": (2, lambda x: x.sum()),
    "a sum over an axis": (1, lambda x: x.sum(axis=0)),
    "rows by number": (1, lambda x: x[np.array([0, 1])]),
    "assignment": (1, lambda x: x.__setitem__(0, 1.0)),
    "assignment from itself": (2, lambda x: x.__setitem__(slice(1, 3), x[:2])),
    "in place": (1, lambda x: x.__iadd__(x)),
    "in place from a part of itself": (2, lambda x: x[1:].__iadd__(x[:-1])),
    "into memory": (1, lambda x: strict.exp(x, out=x)),
    "few arrays joined": (3, lambda x: strict.concatenate([x, x, x])),
    "many arrays joined": (4, lambda x: strict.concatenate([x] * 100)),
    "a product": (1, lambda x: x @ x.T),
    "a product with a matrix that has gaps": (2, lambda x: x[:, ::2] @ x[:2]),
    "a vector times a vector": (3, lambda x: x[0] @ x[0]),
    "products of a batch": (1, lambda x: x[None] @ x[None]),
    "products of a batch, one transposed": (2, lambda x: x[None] @ x[None].swapaxes(1, 2)),
    "an array of matrices times a matrix": (4, lambda x: x[None] @ x),
}


@pytest.mark.parametrize("what", COUNTED)
def test_what_is_counted_as_a_launch(what):
    expected, call = COUNTED[what]
    x = strict.asarray(np.arange(16, dtype="float32").reshape(4, 4))
    with strict.counting() as counts:
        call(x)
    assert counts.launches == expected
