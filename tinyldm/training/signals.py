"""Ctrl-C, SIGTERM and SIGHUP, turned into a request that training honours between two steps."""

import contextlib
import signal
import threading

from tinyldm.kernels.cpu.processes import TO_STOP


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
        self.before = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number in self.SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for other in self.SIGNALS[1:]:
            signal.signal(other, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
