"""The progress bar of long work."""

import os
import threading

from tqdm import tqdm


class Bar(tqdm):
    """tqdm's progress bar, with a lock of this process alone.

    tqdm shares one lock among all forks of a process. A fork that is killed while it holds that
    lock would block the others' bars for ever.
    """


def _own_lock():
    Bar.set_lock(threading.RLock())


_own_lock()
if hasattr(os, "register_at_fork"):  # not on Windows; another thread may hold the lock at a fork
    os.register_at_fork(after_in_child=_own_lock)
