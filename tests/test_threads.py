"""Threads: what they see of their caller, what they leave behind, and batches in parts."""

import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from tinyldm.nn import functional as F
from tinyldm.nn import no_grad
from tinyldm.threads import cores, map_batch, map_threads, one_blas_thread

WORKERS = 2  # asked for by number, so that a machine with one core tests threads too


def test_after_an_error_nothing_is_still_running():
    """Code that went on would find the BLAS library's threads let loose again."""
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


def test_after_ctrl_c_nothing_is_still_running_and_nothing_begins():
    begun, ended = [], []

    def work(i):
        begun.append(i)
        if i == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        ended.append(i)

    with pytest.raises(KeyboardInterrupt):
        map_threads(work, range(50), workers=2)
    assert ended and sorted(ended) == sorted(begun) and len(begun) < 50
    assert map_threads(str, range(3), workers=2) == ["0", "1", "2"]


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
