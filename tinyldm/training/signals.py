"""Ctrl-C, SIGTERM and SIGHUP, turned into a request that training honours between two steps."""

import contextlib
import signal
import threading

from tinyldm.kernels.cpu.processes import TO_STOP

KEPT = (signal.SIG_IGN, None)


class Stopped(Exception):
    """A signal asked training to stop, and everything is saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; everything is saved")
        self.number = number


class Interruptible(contextlib.AbstractContextManager):
    """Context in which signals to end only set `number`; a second one acts at once.

    They are Ctrl-C, SIGTERM, and SIGHUP, which comes where a terminal is closed.
    """

    SIGNALS = TO_STOP

    def __init__(self):
        self.number = None

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            self.before = {}  # signals come to the main thread only
            return self
        found = {number: signal.getsignal(number) for number in self.SIGNALS}
        # What is ignored stays so, as SIGHUP under nohup; None is a handler of another language.
        self.before = {n: handler for n, handler in found.items() if handler not in KEPT}
        for number in self.before:
            signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.number = number
        for other, handler in self.before.items():
            signal.signal(other, handler)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
