"""The gradient of a batch on all cores, and what the threads see of their caller."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_problem import assert_same, loss_fn, problem
from threadpoolctl import threadpool_info, threadpool_limits

from tinyldm.nn import functional as F
from tinyldm.nn import no_grad
from tinyldm.nn.protocol import add_grad
from tinyldm.threads import cores, map_batch, map_threads, one_blas_thread
from tinyldm.training import parallel
from tinyldm.training.step import accumulated, value_and_grad

WORKERS = 2  # asked for by number, so that a machine with one core tests threads too


def whole_batch(params, batch):
    loss, backward = loss_fn(params, *batch)
    grads = {}
    backward(grads)
    return loss, grads


# ------------------------------------------------------------------------------ gradient of a batch


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
    monkeypatch.setattr(parallel, "cores", lambda: available)
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


# ------------------------------------------------------------------------------------------ threads


def test_after_an_error_nothing_is_still_running():
    """What went on would find the BLAS library's threads let loose again."""
    running = []

    def run(i):
        if i == 0:
            raise ZeroDivisionError
        running.append(i)
        time.sleep(0.05)
        running.remove(i)

    with pytest.raises(ZeroDivisionError):
        map_threads(run, range(4), WORKERS)
    still = list(running)
    time.sleep(0.2)  # for the others to end, whatever the answer
    assert still == []


def test_no_grad_is_that_of_the_caller():
    w = np.ones((2, 2))

    def keeps_nothing(_):
        return F.linear(w, w)[1] is None

    with no_grad():
        assert map_threads(keeps_nothing, range(4), WORKERS) == [True] * 4
    assert map_threads(keeps_nothing, range(4), WORKERS) == [False] * 4


def blas_counts(_=None):
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.fixture
def two_blas_threads():
    with threadpool_limits(2, user_api="blas"):
        if blas_counts() != {2}:
            pytest.skip("this BLAS cannot be told how many threads to use")
        yield


@pytest.mark.usefixtures("two_blas_threads")
def test_blas_keeps_to_one_thread_within_and_goes_on_as_before():
    assert map_threads(blas_counts, range(4), WORKERS) == [{1}] * 4
    assert blas_counts() == {2}
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda i: 1 / i, range(4), WORKERS)
    assert blas_counts() == {2}


@pytest.mark.usefixtures("two_blas_threads")
def test_blas_has_all_threads_for_a_single_item():
    assert map_threads(blas_counts, [0], WORKERS) == [{2}]


@pytest.mark.usefixtures("two_blas_threads")
def test_limits_of_blas_can_be_nested():
    with one_blas_thread():
        assert map_threads(blas_counts, range(2), WORKERS) == [{1}] * 2
        assert blas_counts() == {1}
    assert blas_counts() == {2}


# ------------------------------------------------------------------------------------------ batches


@given(n=st.integers(1, 40), size=st.integers(1, 50))
def test_a_batch_in_parts_is_joined_in_order(n, size):
    lengths = []

    def function(x, y):
        lengths.append(len(x))
        return np.stack([x[:, 0], x[:, 1] * y], axis=1)

    x, y = np.arange(2.0 * n).reshape(n, 2), np.arange(n) + 1.0
    found = map_batch(function, x, y, size=size)
    assert sum(lengths) == n and 1 <= min(lengths) and max(lengths) <= size
    assert len(lengths) >= min(cores(), n)  # all cores have something to do
    np.testing.assert_array_equal(found, np.stack([x[:, 0], x[:, 1] * y], axis=1))


def test_a_batch_of_one_part_is_not_copied():
    y = np.ones((1, 3))
    assert map_batch(lambda x: y, np.zeros(1)) is y


# ------------------------------------------------------------------------------ one after the other


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
