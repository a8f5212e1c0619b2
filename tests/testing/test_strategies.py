"""Shapes that fit by construction, examples that can be pasted, and the fixture `gradients`."""

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from tinyldm.testing import check_gradients
from tinyldm.testing.strategies import (
    attentions,
    convolutions,
    group_norms,
    tensors,
    tensors_of,
)

pytest_plugins = ["pytester"]


@given(inputs=tensors("n d", "d k", "k", "n 2*k 3"))
def test_shapes_fit(inputs):
    x, w, b, y = inputs
    assert x.shape[1] == w.shape[0] and w.shape[1:] == b.shape
    assert y.shape == (len(x), 2 * len(b), 3)
    check_gradients(
        lambda x, w, b: (x @ w + b, lambda dy: (dy @ w.T, x.T @ dy, dy.sum(0))), [x, w, b]
    )


@given(inputs=tensors("n k", sizes={"k": st.sampled_from([5, 7])}, largest=2))
def test_sizes_of_other_ranges(inputs):
    (x,) = inputs
    assert x.shape[0] in (1, 2) and x.shape[1] in (5, 7)


@given(inputs=tensors("n d", "d"))
def test_an_example_prints_as_what_makes_it(inputs):
    again = eval(repr(inputs), {"tensors_of": tensors_of})
    for x, y in zip(inputs, again, strict=True):
        np.testing.assert_array_equal(x, y)


def test_failures_shrink_to_small_numbers():
    smallest = find(tensors("n d", "d"), lambda inputs: inputs[0].shape[1] >= 2)
    assert repr(smallest) == "tensors_of('n d', 'd', n=1, d=2, seed=0)"


def test_a_size_that_is_not_given():
    with pytest.raises(ValueError, match="shape 'n d': no size is given for 'd'"):
        tensors_of("n d", n=2)


@given(drawn=convolutions("n i h w", "o i kh kw"))
def test_convolutions_fit(drawn):
    (x, w), options = drawn
    h, p = x.shape[2], options["padding"]
    assert x.shape[1] == w.shape[1] and h + 2 * p >= w.shape[2] and options["stride"] >= 1


@given(drawn=group_norms())
def test_groups_fit(drawn):
    (x, w, b), options = drawn
    assert x.shape[3:] == w.shape == b.shape and len(w) % options["groups"] == 0
    assert x[0].size / options["groups"] >= 3


@given(drawn=attentions())
def test_heads_fit(drawn):
    (q, k, v), options = drawn
    assert q.shape[2] == k.shape[2] and k.shape[1] == v.shape[1]
    assert q.shape[2] % options["heads"] == 0 == v.shape[2] % options["heads"]


def test_a_call_prints_as_what_makes_it():
    smallest = find(attentions(), lambda drawn: drawn.options["causal"])
    assert repr(smallest) == (
        "Call(inputs=tensors_of('n l d', 'n m d', 'n m e', n=1, l=1, d=1, m=1, e=1, seed=0), "
        "options={'heads': 1, 'causal': True})"
    )


SUITE = """
import numpy as np
from hypothesis import given
from tinyldm.testing.strategies import tensors


@given(inputs=tensors("n d"))
def test_right(gradients, inputs):
    assert gradients(lambda x: (x * x, lambda dy: 2 * x * dy), inputs)["x"] < 1e-15


def test_wrong(gradients):
    gradients(lambda x: (x * x, lambda dy: x * dy), np.ones(3))


def test_that_does_not_use_it():
    pass
"""


@pytest.mark.parametrize("words, seed", [([], 0), (["--gradcheck-seed", "7"], 7)])
def test_the_fixture(pytester, words, seed):
    pytester.makepyfile(SUITE)
    done = pytester.runpytest_subprocess("-p", "tinyldm.pytest_plugin", *words)
    done.assert_outcomes(passed=2, failed=1)
    done.stdout.fnmatch_lines([f"gradients: tensors right: *, checks that passed: *; seed {seed}"])
    done.stdout.fnmatch_lines(["*likely cause: it is multiplied by ½*"])
    assert "gradcheck.py" not in done.stdout.str()  # none of this package's source
    done = pytester.runpytest_subprocess("-p", "tinyldm.pytest_plugin", "-k", "not_use")
    assert "gradients:" not in done.stdout.str()
