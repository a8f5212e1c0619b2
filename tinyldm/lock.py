"""The lock of a run's folder: one process at a time writes into it."""

import contextlib
import errno
import json
import os
import platform
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from tinyldm.files import shown

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

NAME = ".lock"
SILENCE = 300  # seconds after which a holder on another host counts as gone

_own = set()  # locks that this process holds: to the system they are free for all its threads


class Locked(ValueError):
    """Another process writes into the folder; the message names it."""


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if need be, for the length of a `with` block.

    It is the system's lock on a file, which ends with its process, however that ends; forked copies
    do not have it. The file says who holds it. Raises Locked where somebody else does.
    """
    folder = Path(folder)
    file = folder.resolve() / NAME
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    if file in _own:
        raise Locked(_message(folder, f"process {os.getpid()}, this one,"))
    handle = _acquire(folder, file)
    _own.add(file)
    try:
        holder = json.dumps({"process": os.getpid(), "host": platform.node()})
        os.truncate(handle, 0)
        os.pwrite(handle, holder.encode(), 0)
        yield
    finally:
        _own.discard(file)
        file.unlink(missing_ok=True)
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):  # where there is something in it by now
                folder.rmdir()


def _acquire(folder, file):
    while True:
        handle = _open(file)
        if not (_lock(handle) or _lock_later(handle)):
            holder = _holder(os.read(handle, 1000))
            os.close(handle)
            raise Locked(_message(folder, holder))
        with contextlib.suppress(FileNotFoundError):
            if os.stat(file).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)  # its last holder has removed it in the meantime
    content = os.pread(handle, 1000, 0)
    elsewhere = _field(content, "host") not in (None, platform.node())
    if elsewhere and time.time() - os.fstat(handle).st_mtime < SILENCE:
        os.close(handle)  # for a lock may not reach over a network
        raise Locked(
            f"{folder}: {_holder(content)} trained into it less than {SILENCE // 60} minutes ago; "
            f"if it no longer runs, wait that long, or remove {file}"
        )
    return handle


def _open(file):
    """Open the file of a lock, made if need be: a link would lead to somebody's file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # for a pipe may never open
    try:
        handle = os.open(file, flags, 0o666)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise ValueError(
        f"{shown(file)}: expected the file of a lock, found a link, a folder or a pipe; remove it"
    )


def is_locked(folder: str | Path) -> bool:
    """Return whether a process writes into the folder at this time."""
    file = Path(folder).resolve() / NAME
    if fcntl is None or not file.is_file() or file.is_symlink():
        return False
    if file in _own:
        return True
    try:
        handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def touch(folder: str | Path) -> None:
    """Say that the holder of the lock is alive."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(Path(folder) / NAME)


def _lock(handle):
    """Try to lock a file; where the file system has no locks, that counts as locked by us."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _lock_later(handle):
    time.sleep(0.1)  # in which somebody who only looked, as `is_locked` does, has gone
    return _lock(handle)


def _field(content, name):
    try:
        return json.loads(content)[name]
    except (ValueError, KeyError, TypeError):
        return None


def _holder(content):
    process, host = (_field(content, name) for name in ("process", "host"))
    return "another process" if process is None else f"process {process} on {host}"


def _message(folder, holder):
    return f"{folder}: {holder} trains into it; wait for it or stop it, or take another --out"
