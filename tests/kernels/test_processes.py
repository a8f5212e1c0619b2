"""Work shared with copies of this process: results, errors, and that nothing of them stays."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_problem import assert_same, loss_fn, problem
from threadpoolctl import threadpool_info

from tinyldm.kernels.cpu import processes as processes_module
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.kernels.cpu.processes import WorkerError, available, shared, worker_pool
from tinyldm.nn import no_grad
from tinyldm.nn.activations import silu
from tinyldm.threads import cores, free_cores, map_threads
from tinyldm.training.step import gradient, value_and_grad

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads do the work")


def children():
    """Of this process, those that have ended and were not waited for among them."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    return [line for line in listed.stdout.splitlines() if not line.endswith(" ps")]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_share_is_done_once_in_its_own_process(size):
    with worker_pool(lambda a, b: (a + b, os.getpid()), size) as call:
        for _ in range(3):
            results = call([(i, 10.0) for i in range(size)])
            assert [result for result, _ in results] == [i + 10.0 for i in range(size)]
            assert len({process for _, process in results}) == size
            assert results[0][1] == os.getpid()
        assert len(call([(1, 2.0)])) == 1  # fewer shares than processes
    assert not children()


def test_arrays_come_and_go_whole():
    rng = np.random.default_rng(0)
    shares = [(rng.normal(size=(50, 40)), rng.normal(size=(40, 30))) for _ in range(2)]
    with worker_pool(np.matmul, 2) as call:
        for found, (a, b) in zip(call(shares), shares, strict=True):
            assert np.array_equal(found, a @ b)


def test_no_core_is_free_while_a_pool_works():
    with worker_pool(lambda: free_cores(), 2) as call:
        assert free_cores() == cores()  # for what is done between its calls, such as an update
        assert call([(), ()]) == [1, 1]
        assert free_cores() == cores()


def test_shared_arrays_are_seen_by_all_and_others_are_not():
    here, both = np.zeros(3), shared(3, np.dtype(float))

    def work(value):
        here[:], both[:] = value, both + value
        return both.copy()

    with worker_pool(work, 2) as call:
        both[:] = 5
        _, there = call([(0.0,), (2.0,)])
        assert np.array_equal(there, both) and (both >= 5).all() and both[0] in (5.0, 7.0)
        assert np.array_equal(here, [0, 0, 0])


def test_blas_has_one_thread_in_every_process_and_pools_are_not_used():
    def threads(_):
        blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        names = map_threads(lambda _: threading.current_thread().name, range(2))
        return set(blas), len(set(names))

    map_threads(lambda _: None, range(2))  # the pool exists, and its threads are not copied
    before = threads(0)
    with worker_pool(threads, 2) as call:
        here, there = call([(0,), (0,)])
        assert here == there == ({1}, 1)
    assert threads(0)[0] == before[0]


def test_the_state_of_no_grad_is_that_of_the_caller():
    with no_grad(), worker_pool(lambda x: silu(x)[1] is None, 2) as call:
        assert call([(np.ones(2),), (np.ones(2),)]) == [True, True]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_is_raised_here_and_the_team_goes_on(failing):
    def work(i):
        if i == failing:
            raise ValueError(f"share {i}")
        return i

    with worker_pool(work, 3) as call:
        with pytest.raises(ValueError, match=f"^share {failing}$"):
            call([(0,), (1,), (2,)])
        assert call([(5,), (6,), (7,)]) == [5, 6, 7]
    assert not children()


def test_a_process_that_was_killed_is_told_of():
    with worker_pool(lambda: os.getpid(), 2) as call:
        _, process = call([(), ()])
        os.kill(process, signal.SIGKILL)
        with pytest.raises(WorkerError, match="killed, or memory was short"):
            for _ in range(3):
                call([(), ()])
    assert not children()


def test_a_stop_from_the_terminal_is_left_to_the_first_process():
    with worker_pool(lambda: os.getpid(), 2) as call:
        _, process = call([(), ()])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process, number)
        assert call([(), ()]) == [os.getpid(), process]


def test_a_signal_in_a_fork_is_not_lost():
    """A hook of the fork would swallow what it raises; it comes when the fork is done."""
    hooks, seen = [], []
    os.register_at_fork(before=lambda: hooks and hooks.pop()())
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("between"))
    hooks.append(lambda: (os.kill(os.getpid(), signal.SIGINT), seen.append("in the hook")))
    try:
        with worker_pool(lambda: os.getpid(), 2) as call:
            assert seen == ["in the hook", "between"]
            _, process = call([(), ()])
            os.kill(process, signal.SIGINT)  # nor does the copy take it for its own
            assert call([(), ()]) == [os.getpid(), process]
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_stays_when_the_block_is_left_in_the_middle_of_work():
    def work(i):
        if i == 0:
            raise KeyboardInterrupt
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), worker_pool(work, 2) as call:
        call([(0,), (1,)])
    assert not children()
    assert time.monotonic() - started < 30


def test_the_others_end_when_the_first_process_is_killed():
    code = (
        "import os, time\n"
        "from tinyldm.kernels.cpu.processes import worker_pool\n"
        "with worker_pool(os.getpid, 2) as call:\n"
        "    print(call([(), ()])[1], flush=True)\n"
        "    time.sleep(60)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process = int(first.stdout.readline())
    first.kill()
    first.wait()
    first.stdout.close()
    for _ in range(600):
        if not os.path.exists(f"/proc/{process}/cwd") or state_of(process) in "ZX":
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    raise AssertionError("it went on")


def state_of(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def test_there_is_no_team_where_another_thread_could_hold_a_lock(monkeypatch):
    monkeypatch.setattr(processes_module, "cores", lambda: 3)
    map_threads(lambda _: None, range(2))  # ours wait idle
    assert available() == 3, threading.enumerate()
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        assert available() == 1
    finally:
        done.set()
        other.join()
    monkeypatch.setattr(processes_module.sys, "platform", "win32")
    assert available() == 1


@pytest.mark.parametrize("preset, expected", [("1", 1), ("5", 5), ("", 3)])
def test_the_number_of_processes_can_be_set(monkeypatch, preset, expected):
    monkeypatch.setattr(processes_module, "cores", lambda: 3)
    monkeypatch.setenv(processes_module.PRESET, preset)
    assert available() == expected


@pytest.mark.parametrize("preset", ["0", "-1", "two", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, preset):
    monkeypatch.setenv(processes_module.PRESET, preset)
    with pytest.raises(ValueError, match=f"TINYLDM_PROCESSES: expected .* found '{preset}'"):
        available()


# -------------------------------------------------------------------------- gradients by processes


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9), processes=st.integers(2, 4))
def test_gradients_are_those_of_threads_to_the_last_bit(seed, n, processes):
    params, batch = problem(seed, n)
    flat = Flat(params, shared=True)
    with gradient(loss_fn, flat, processes) as gradient_of:
        for _ in range(2):
            loss, grads = gradient_of(batch)
            expected_loss, expected = value_and_grad(loss_fn, flat, batch, processes)
            assert loss == expected_loss
            assert grads.keys() == expected.keys()
            assert all(np.array_equal(grads[name], expected[name]) for name in grads)
            flat.flat[...] *= 1.5  # a step, which the others must see


def test_without_shared_parameters_threads_do_it():
    params, batch = problem(0, 6)
    with gradient(loss_fn, Flat(params)) as gradient_of:
        assert_same(gradient_of(batch), value_and_grad(loss_fn, params, batch))
        assert not children()


def test_arrays_of_different_lengths_are_refused():
    params, (x, target, rows) = problem(0, 4)
    with gradient(loss_fn, Flat(params, shared=True), 2) as gradient_of:
        with pytest.raises(ValueError, match="expected arrays of one length"):
            gradient_of((x, target[:3], rows))
