"""The machine as the operating system reports it, and the share that this process has of it.

In a container the machine is larger than the share: the limits of its control groups count too.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def processor() -> str:
    """Return the name of the CPU, as far as it is known."""
    names = [
        line.partition(":")[2].strip()
        for line in _read(PROC / "cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def quota() -> float | None:
    """Return the cores' worth of time that control groups grant; None where there is no limit."""
    limits = []
    for folder in _control_groups("cpu"):
        version_2 = _read(folder / "cpu.max").split()
        version_1 = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        granted, period = version_2 or version_1
        if granted.isdecimal() and period.isdecimal():  # not "max", "-1" or ""
            limits.append(int(granted) / int(period))
    return min(limits, default=None)


def free_memory() -> int | None:
    """Return the bytes that this process can still take, of the machine or its control groups.

    None where it cannot be known.
    """
    free = [_available(), *map(_left, _control_groups("memory"))]
    return min((size for size in free if size is not None), default=None)


def held_memory() -> int:
    """Return the bytes that this process holds; the most that it held where only that is known.

    Returns 0 where neither is known.
    """
    pages = _read(PROC / "self" / "statm").split()
    if pages:
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else 1024 * most


def _available():
    """Return the free memory of the whole machine in bytes, or None."""
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _left(folder):
    """Return the limit of one control group, less what is used and no mere cache of files."""
    stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _read(folder / limit).strip(), _read(folder / used).strip()
        if limit.isdecimal() and used.isdecimal():
            return max(0, int(limit) - int(used) + int(stat.get(cache, 0)))
    return None


def _control_groups(controller) -> Iterator[Path]:
    """Yield the folders of this process's control groups (version 1 and 2) and their parents."""
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = CGROUPS
        elif controller in controllers.split(","):
            root = CGROUPS / controller
        else:
            continue
        folder = root / path.strip("/")
        yield folder
        while folder != root:  # which a container may see as its own
            folder = folder.parent
            yield folder


def _read(file):
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def keep_freed_memory(most: int = 2**30) -> None:
    """Have the C library keep what is freed, up to `most` bytes, for the arrays that come next.

    Otherwise it returns large arrays to the system at once, and each new one comes page by page,
    zeroed: a twentieth of the time of a train step. Only glibc is known to be told so.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, most)
        libc.mallopt(mmap_max, 0)


def duration(seconds: float) -> str:
    """Format a duration, such as "45 s", "4 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def gigabytes(size: float) -> str:
    """Format bytes, such as "0.8 GB"."""
    return f"{size / 1e9:.1f} GB"
