"""The gradient of a batch on all cores: that of the whole batch, however it is cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_problem import assert_same, loss_fn, problem, whole_batch

from tinyldm.kernels.cpu import parallel
from tinyldm.kernels.cpu.parallel import value_and_grad
from tinyldm.nn.protocol import add_grad


@given(data=st.data(), seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9))
def test_equals_the_gradient_of_the_whole_batch_however_it_is_cut(data, seed, n):
    params, batch = problem(seed, n)
    before = [x.copy() for x in (*params.values(), *batch)]
    expected = whole_batch(params, batch)
    shards = data.draw(st.integers(1, 12))
    assert_same(value_and_grad(loss_fn, params, batch, shards), expected)
    assert_same(value_and_grad(loss_fn, params, batch), expected)
    for x, old in zip((*params.values(), *batch), before, strict=True):
        np.testing.assert_array_equal(x, old)


@pytest.mark.parametrize("shards", range(1, 9))
def test_every_cut_of_seven_samples(shards):
    params, batch = problem(0, 7)
    assert_same(value_and_grad(loss_fn, params, batch, shards), whole_batch(params, batch))


def test_parts_count_by_their_length():
    """The mean of 0 … 6 from parts of 2, 2 and 3; the mean of the parts' means is 2.17."""
    seen = []

    def mean(params, x):
        seen.append(len(x))
        return x.mean(), lambda grads: grads.update(w=np.array([x.mean()]))

    loss, grads = value_and_grad(mean, {}, (np.arange(7.0),), shards=3)
    assert sorted(seen) == [2, 2, 3]
    np.testing.assert_allclose([loss, grads["w"][0]], [3, 3], rtol=1e-14)


@pytest.mark.parametrize("available", [1, 3, 8])
def test_a_part_for_each_core_as_far_as_samples_go(available, monkeypatch):
    monkeypatch.setattr(parallel, "free_cores", lambda: available)
    params, batch = problem(0, 5)
    lengths = []

    def counted(params, *part):
        lengths.append(len(part[0]))
        return loss_fn(params, *part)

    assert_same(value_and_grad(counted, params, batch), whole_batch(params, batch))
    assert len(lengths) == min(5, available) and sum(lengths) == 5 and min(lengths) > 0


def test_a_parameter_without_axes_counts_like_the_others():
    """Its gradient is a NumPy number, which cannot be changed in place."""

    def square(params, x):
        error = x - params["c"]
        return (error**2).mean(), lambda grads: add_grad(grads, "c", -2 * error.mean())

    x = np.arange(7.0)
    loss, grads = value_and_grad(square, {"c": np.array(0.5)}, (x,), shards=3)
    np.testing.assert_allclose([loss, grads["c"]], [((x - 0.5) ** 2).mean(), -5], rtol=1e-14)


def test_float32_stays_float32():
    params, batch = problem(0, 7)
    params = {name: w.astype("float32") for name, w in params.items()}
    batch = (batch[0].astype("float32"), batch[1].astype("float32"), batch[2])
    loss, grads = value_and_grad(loss_fn, params, batch, 3)
    assert {loss.dtype, *(dw.dtype for dw in grads.values())} == {np.dtype("float32")}


def test_arrays_of_unequal_lengths_are_refused():
    params, (x, target, rows) = problem(0, 5)
    with pytest.raises(ValueError, match=r"one length, at least 1, found \[5, 4, 5\]$"):
        value_and_grad(loss_fn, params, (x, target[:4], rows))
    with pytest.raises(ValueError, match=r"found \[0, 0, 0\]$"):
        value_and_grad(loss_fn, params, (x[:0], target[:0], rows[:0]))


def test_an_error_in_a_part_is_raised():
    def fails(params, x):
        if 3 in x:
            raise FloatingPointError("sample 3")
        return x.mean(), lambda grads: None

    with pytest.raises(FloatingPointError, match="^sample 3$"):
        value_and_grad(fails, {}, (np.arange(7.0),), shards=3)
