"""Progress bars of processes that are forked and killed."""

import io
import os
import signal
import threading

from tinyldm.progress import Bar


def test_a_fork_that_is_killed_within_a_bar_blocks_no_other():
    Bar(total=1, file=io.StringIO()).close()
    process = os.fork()
    if not process:
        Bar.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    made = threading.Thread(target=lambda: Bar(total=1, file=io.StringIO()).close(), daemon=True)
    made.start()
    made.join(10)
    assert not made.is_alive()


def test_a_lock_that_is_held_at_a_fork_is_free_in_the_child():
    with Bar.get_lock():
        process = os.fork()
        if not process:
            taken = []
            other = threading.Thread(
                target=lambda: taken.append(Bar.get_lock().acquire(timeout=5)), daemon=True
            )
            other.start()
            other.join(10)
            os._exit(0 if taken == [True] else 1)
        assert os.waitpid(process, 0)[1] == 0
