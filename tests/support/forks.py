"""Work in processes of their own, so that what a planted fault breaks ends with it."""

import ast
import contextlib
import faulthandler
import multiprocessing
import os
import resource
import select
import signal


def in_fork(work, seconds):
    """Call `work()` in a fork → the literal that it returns, or None where it died.

    seconds: of processor time, or three times as many of the clock's, after which it is ended.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        faulthandler.disable()  # how it died is of no interest
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            os.write(writing, repr(work()).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        ended, _, _ = select.select([stream], [], [], 3 * seconds)
        said = stream.readline() if ended else ""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)  # and what it began
    os.waitpid(process, 0)
    return ast.literal_eval(said) if said else None


def each(work, items):
    """Yield (item, work(item)) of all items, in their order, computed on all cores."""
    context = multiprocessing.get_context("fork")
    with context.Pool(len(os.sched_getaffinity(0)), maxtasksperchild=20) as pool:
        yield from zip(items, pool.imap(work, items), strict=True)
