"""The command line: `tinyldm demo`, `train`, `sample`, `eval`, `explain`, `experiment`, ….

Only results go to stdout. A user's mistake is one line on stderr and exit code 2, a failure while
running is 1, and 129, 130 or 143 mean: interrupted, with everything saved. Each command is a
module of this package, imported once it is called: `tinyldm --help` is immediate.
"""

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import TextIO

from tinyldm import __version__
from tinyldm.cli.arguments import Parser, say

COMMANDS = {  # name → what it does, for --help
    "demo": "train on captioned shapes in five minutes, and score it",
    "train": "train both stages on shapes or on a folder of images",
    "sample": "generate images from a caption",
    "eval": "score a run, on shapes or on any images",
    "experiment": "try a claim of the field at small scale",
    "explain": "write pages that show what a run has learnt, and let it generate in a browser",
    "exercise": "write a line of the source yourself, and have it checked",
    "doctor": "check that everything is there, and how fast it is",
}
FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)  # of a disk, not of the user
MODULES = {"eval": "evaluate"}  # where the name of a command is not that of its module


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; → exit code."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    try:
        with _like_ctrl_c("SIGTERM", "SIGHUP"):
            code = _run(arguments)
        return code or int(sys.stdout.failed)  # results that could not be written
    except SystemExit as end:  # after --help, or a mistake
        sys.stdout.flush()
        raise SystemExit(end.code or int(sys.stdout.failed)) from None
    finally:
        sys.stdout, sys.stderr = sys.stdout.stream, sys.stderr.stream


class Interrupted(KeyboardInterrupt):
    """A signal that ends a process, as an exception: what is under way is cleared up."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def _like_ctrl_c(*names):
    """Have these signals raise Interrupted, where nobody has asked for anything else."""

    def interrupt(number, _):
        raise Interrupted(number)

    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # signals come to the main thread only
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


class Stream:
    """A stream whose reader may be gone, or which was never open: the work is done all the same.

    The bytes of a file's name stay as they are; what the encoding lacks besides is escaped.
    """

    def __init__(self, stream: TextIO | None):
        self.stream, self.failed = stream, False
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tinyldm")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        """Return whether somebody looks at it."""
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def write(self, text: str) -> int:
        """Write what can be written."""
        with self._tolerant():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with self._tolerant():
            self.stream.flush()

    @contextlib.contextmanager
    def _tolerant(self):
        if self.stream is None:
            with contextlib.suppress(AttributeError):
                yield
            return
        try:
            yield
        except (OSError, ValueError) as error:  # nobody reads, there is no space, or it is closed
            self.failed |= isinstance(error, OSError) and error.errno in FAILURES
            with contextlib.suppress(OSError, ValueError):  # so that Python does not try again
                handle, nowhere = self.stream.fileno(), os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, handle)
                os.close(nowhere)


def _as_it_was_or_escaped(error):
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("tinyldm", _as_it_was_or_escaped)


def _run(arguments):
    try:
        options, extra = parser().parse_known_args(arguments)
        if extra:
            options.parser.refuse(extra[0])
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as interrupt:
        print("tinyldm: interrupted", file=sys.stderr)
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        say(f"tinyldm: {error}" + "; a file could not be written: make room on its disk" * full)
        return code


def _show_warning(message, *_, **__):
    say(f"tinyldm: {message}")


def _exit_code(error):
    if isinstance(error, ValueError):
        return 2
    from tinyldm.backend import DeviceError
    from tinyldm.training.metrics import Diverged
    from tinyldm.training.signals import Stopped

    if isinstance(error, Stopped):
        return 128 + error.number
    full = isinstance(error, OSError) and error.errno in FAILURES
    if isinstance(error, (Diverged, MemoryError)) or full:
        return 1
    if isinstance(error, (ValueError, DeviceError, OSError)):
        return 2  # loaders and models report these in one line
    return None


def parser() -> Parser:
    """Return the parser of all commands; each adds its own arguments once it is called."""
    top = Parser(
        prog="tinyldm",
        description="A whole Stable Diffusion, trained and sampled in NumPy.",
        epilog="Start with `tinyldm demo`. If anything is odd, run `tinyldm doctor`.",
    )
    top.add_argument("--version", action="version", version=f"tinyldm {__version__}")
    top.set_defaults(parser=top)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for name, text in COMMANDS.items():
        module = f"tinyldm.cli.{MODULES.get(name, name)}"
        commands.add_parser(name, help=text, description=text, module=module)
    return top
