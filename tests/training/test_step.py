"""A step of training: its gradient, in one part or several."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_problem import assert_same, loss_fn, problem, whole_batch

from tinyldm.kernels import plain
from tinyldm.training.step import accumulated, value_and_grad


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9))
def test_the_kernel_gives_the_gradient_of_the_plain_function(seed, n):
    params, batch = problem(seed, n)
    with plain():
        expected = value_and_grad(loss_fn, params, batch)
    assert_same(expected, whole_batch(params, batch))
    assert_same(value_and_grad(loss_fn, params, batch), expected)


def test_arrays_of_unequal_lengths_are_refused():
    params, (x, target, rows) = problem(0, 5)
    with plain(), pytest.raises(ValueError, match=r"one length, at least 1, found \[5, 4, 5\]$"):
        value_and_grad(loss_fn, params, (x, target[:4], rows))


@given(seed=st.integers(0, 99), n=st.integers(1, 9), parts=st.integers(1, 12))
def test_a_batch_in_parts_has_the_same_gradient(seed, n, parts):
    params, batch = problem(seed, n)
    seen, memory = [], {}

    def gradient_of(part):
        """As from other processes: the arrays are overwritten by the next call."""
        seen.append(len(part[0]))
        loss, grads = whole_batch(params, part)
        for name, dw in grads.items():
            memory.setdefault(name, np.empty_like(dw))[...] = dw
        return loss, {name: memory[name] for name in grads}

    found = accumulated(gradient_of, parts)(batch)
    assert_same(found, whole_batch(params, batch))
    assert len(seen) == min(n, parts) and sum(seen) == n and max(seen) - min(seen) <= 1
