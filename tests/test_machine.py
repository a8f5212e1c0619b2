"""What is read of the operating system, from copies of its files."""

import os
import platform
import subprocess
import sys

import pytest

from tinyldm import machine

MEMINFO = "MemTotal: 8000 kB\nMemFree: 1000 kB\nMemAvailable:    6000 kB\n"
UNLIMITED = "9223372036854771712\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """`system(file=text, …)` writes files under /proc and /sys/fs/cgroup of a made-up machine."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")

    def write(files):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


def test_the_processor_has_a_name(system):
    system({"proc/cpuinfo": "processor : 0\nmodel name\t: A Fast One\nmodel name\t: A Fast One\n"})
    assert machine.processor() == "A Fast One"


def test_free_memory_of_a_machine_without_limits(system):
    system({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a\n", "cgroup/a/memory.max": "max\n"})
    assert machine.free_memory() == 6000 * 1024


VERSION_2 = {
    "proc/self/cgroup": "0::/pod/job\n",
    "cgroup/pod/memory.max": "2000000",
    "cgroup/pod/memory.current": "1500000",
    "cgroup/pod/memory.stat": "anon 1000000\ninactive_file 300000\n",
    "cgroup/pod/job/memory.max": "max",
    "cgroup/pod/job/memory.current": "1400000",
    "cgroup/pod/cpu.max": "150000 100000\n",
    "cgroup/pod/job/cpu.max": "max 100000\n",
}
VERSION_1 = {  # of a container, where the path is that of the host and not to be seen
    "proc/self/cgroup": "5:memory:/docker/abc\n4:cpuset:/\n3:cpu,cpuacct:/docker/abc\n",
    "cgroup/memory/memory.limit_in_bytes": "2000000",
    "cgroup/memory/memory.usage_in_bytes": "1500000",
    "cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300000\n",
    "cgroup/cpu/cpu.cfs_quota_us": "150000\n",
    "cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1], ids=["version 2", "version 1"])
def test_limits_of_control_groups(system, files):
    system({"proc/meminfo": MEMINFO} | files)
    assert machine.free_memory() == 800_000
    assert machine.quota() == 1.5


def test_control_groups_without_limits(system):
    system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:memory:/\n1:cpu:/\n",
            "cgroup/memory/memory.limit_in_bytes": UNLIMITED,
            "cgroup/memory/memory.usage_in_bytes": "1500000",
            "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "cgroup/cpu/cpu.cfs_period_us": "100000\n",
        }
    )
    assert machine.free_memory() == 6000 * 1024
    assert machine.quota() is None


def test_a_system_that_says_nothing(system, monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert machine.free_memory() is None
    assert machine.quota() is None
    assert isinstance(machine.processor(), str)


def test_a_system_without_files_but_with_sysconf(system, monkeypatch):
    sizes = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__, raising=False)
    assert machine.free_memory() == 4_096_000


def test_held_memory(system):
    system({"proc/self/statm": "9000 700 300 1 0 500 0\n"})
    assert machine.held_memory() == 700 * os.sysconf("SC_PAGE_SIZE")


def test_this_very_process_holds_memory_and_could_take_more():
    assert machine.held_memory() > 1_000_000
    assert machine.free_memory() is None or machine.free_memory() > 0


FAULTS_OF_NEW_ARRAYS = """
import resource, sys
import numpy as np
from tinyldm import machine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.empty(2**22, np.uint8)[:: 2**12] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "keep" in sys.argv:
    machine.keep_freed_memory()
np.empty(2**22, np.uint8)[:] = 1
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept():
    """An array of 1,024 pages is made and forgotten twenty times: its pages are there already."""
    counts = [
        int(subprocess.run(
            [sys.executable, "-c", FAULTS_OF_NEW_ARRAYS, *argument],
            check=True, capture_output=True, text=True,
            # A fixed threshold, or it adapts; and no huge pages, which need few faults anyhow.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "NUMPY_MADVISE_HUGEPAGE": "0"},
        ).stdout)
        for argument in ([], ["keep"])
    ]  # fmt: skip
    assert counts[0] > 20 * 256 and counts[1] < 1100


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (260, "4 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert machine.duration(seconds) == text


def test_sizes():
    assert machine.gigabytes(849_000_000) == "0.8 GB"
