"""Work shared with copies of this process.

Python runs one thread at a time; NumPy lets go of that lock for the length of an operation. Where
operations are short, threads spend as much time handing the lock over as computing, and a network
made of them is no faster on two threads than on one. A copy of the process has a lock of its own.

`os.fork` makes such a copy in milliseconds: it sees everything that is in memory now, without
copying it, and later what is written to arrays from `shared`.
"""

import contextlib
import ctypes
import mmap
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe

import numpy as np

from tinyldm.nn.protocol import use_kernels
from tinyldm.threads import (
    WORKER,
    cores,
    limited_blas,
    one_blas_thread,
    only_thread,
    sequential,
)

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
PRESET = "TINYLDM_PROCESSES"
MOST = 256  # processes
TO_STOP = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def shared(size: int, dtype: np.dtype) -> np.ndarray:
    """Allocate a flat array of zeros that processes forked later read and write too."""
    return np.frombuffer(mmap.mmap(-1, max(1, size * dtype.itemsize)), dtype, size)


def available() -> int:
    """Return how many processes can share work: the cores, or 1 where a fork would not be safe.

    A fork has only the thread that made it, and a lock that another one held stays locked. So
    there must be no other; ours, and those of BLAS, wait idle and are restarted. The environment
    variable TINYLDM_PROCESSES sets another number; ValueError for others than 1…256.
    """
    if sys.platform != "linux" or not use_kernels.get() or not only_thread():
        return 1
    preset = os.environ.get(PRESET, "")
    if not preset:
        return cores()
    if not (preset.isdecimal() and len(preset) < 9 and 1 <= int(preset) <= MOST):
        raise ValueError(f"{PRESET}: expected an integer 1…{MOST}, found {preset!r:.40}")
    return int(preset)


class WorkerError(RuntimeError):
    """A process of the worker pool has ended, as where memory is short."""


class WorkerPool:
    """Worker pool: calls a function with several shares of some work, each in its own process."""

    def __init__(self, function: Callable, connections: list[Connection]):
        self._function, self._connections = function, connections

    def __call__(self, shares: list[tuple]) -> list:
        """Return `[function(*share) for share in shares]`, for at most as many shares as processes.

        The first share is done here; arguments and results of the others are copied. An
        exception is raised here, once all have ended.
        """
        others = self._connections[: len(shares) - 1]
        with _explained():
            for connection, share in zip(others, shares[1:], strict=True):
                connection.send(share)
        with sequential() if others else contextlib.nullcontext():  # the cores are taken
            outcomes = [_attempt(self._function, shares[0])]
        with _explained():
            outcomes += [connection.recv() for connection in others]
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]


@contextlib.contextmanager
def worker_pool(function: Callable, size: int) -> Iterator[WorkerPool]:
    """Open a worker pool of `size` processes, this one included, for the length of a `with` block.

    Within it BLAS has one thread; between two calls `map_threads` has all cores.
    """
    connections, processes = [], []
    try:
        for _ in range(size - 1):
            here, there = Pipe()
            sys.stdout.flush(), sys.stderr.flush()  # or the copy would say it a second time
            with warnings.catch_warnings(), _signals_wait():
                # Python warns of forking with threads: those of BLAS, which handles it.
                warnings.simplefilter("ignore", DeprecationWarning)
                process = os.fork()
                if process == 0:
                    _serve(function, there, [*connections, here])
            there.close()
            connections.append(here)
            processes.append(process)
        with limited_blas() if size > 1 else contextlib.nullcontext():
            yield WorkerPool(function, connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)  # it holds nothing that anyone still waits for
            os.waitpid(process, 0)


@contextlib.contextmanager
def _signals_wait():
    """Have signals to stop come at the end of a block: hooks of a fork swallow what they raise."""
    if threading.current_thread() is not threading.main_thread():  # to which alone they come
        yield
        return
    came = []
    waiting = [n for n in TO_STOP if signal.getsignal(n) is not None]  # as another language's
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in waiting}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _serve(function, connection, not_ours):
    """Serve shares until the other end of the connection is closed. Does not return."""
    try:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # in the middle of work, too
        threading.current_thread().name = WORKER  # its pool of threads was not copied
        for other in not_ours:
            other.close()  # or it would not be closed when the first process ends
        for number in TO_STOP:
            signal.signal(number, signal.SIG_IGN)  # the first process decides
        with one_blas_thread(), contextlib.suppress(EOFError, OSError):
            while True:
                connection.send(_attempt(function, connection.recv()))
    finally:
        os._exit(0)  # without the clean-up that is the first process' business


def _attempt(function, share):
    try:
        return function(*share), None
    except Exception as error:
        return None, error


@contextlib.contextmanager
def _explained():
    try:
        yield
    except (EOFError, OSError) as error:
        raise WorkerError(
            "a process that shares the work has ended: it was killed, or memory was short"
        ) from error
