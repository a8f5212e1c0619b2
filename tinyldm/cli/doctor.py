"""Report what is installed, how fast it is, and what would make it faster.

The doctor must run on a broken installation, so it imports a module only to examine it.
"""

import importlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tinyldm import __version__, machine
from tinyldm.cli.arguments import add_device

PACKAGES = {  # as pip knows them → as Python does
    "numpy": "numpy",
    "scipy": "scipy",
    "pillow": "PIL",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "threadpoolctl": "threadpoolctl",
}
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
CORE = "OPENBLAS_CORETYPE"
DEMO_DISK = 250_000_000  # bytes that its folder needs, with room to write the next state
SLOW = 5.0  # GF/s a core: about what a processor reaches without an optimised BLAS

Finding = tuple[dict[str, object], list[str]]  # facts {name: value}, and problems


@dataclass(frozen=True)
class Report:
    """Findings. facts: {group: {name: value}}. problems: a line each, with what to do about it."""

    facts: dict[str, dict[str, object]]
    problems: list[str]

    def __str__(self) -> str:
        lines = []
        for group, facts in self.facts.items():
            lines += [group, *(f"  {name}: {value}" for name, value in facts.items()), ""]
        if not self.problems:
            return "\n".join([*lines, "no problems found"])
        return "\n".join([*lines, "problems", *(f"  {problem}" for problem in self.problems)])

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def add_arguments(parser: ArgumentParser) -> None:
    """Add --json and --device."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_device(parser)


def run(options: Namespace) -> None:
    """Print the report."""
    report = examine(options.device)
    print(report.to_json() if options.json else report)


def examine(device: str = "cpu") -> Report:
    """Examine the installation and the machine, and measure for a few seconds.

    device: "cpu" or "cuda", on which the demo is timed. Nothing is raised for what is missing: it
    becomes a problem of the report.
    """
    facts, problems = {}, []
    for group, look in {
        "versions": versions,
        "machine": hardware,
        "arithmetic": partial(arithmetic, device),
        "speed": partial(speed, device),
    }.items():
        facts[group], found = look()
        problems += found
        if group == "versions" and found:
            break  # nothing else would run
    return Report(facts, problems)


def versions() -> Finding:
    """Report the versions of this package, Python and the required packages, importing each."""
    facts = {"tinyldm": __version__, "Python": platform.python_version()}
    problems = []
    for package, module in PACKAGES.items():
        try:
            importlib.import_module(module)
            facts[package] = importlib.metadata.version(package)
        except Exception as error:  # a broken package raises anything
            facts[package] = f"{type(error).__name__}: {error}"
            problems.append(
                f"{package} cannot be imported: {sys.executable} -m pip install --force-reinstall "
                f"{package}"
            )
    return facts, problems


def hardware() -> Finding:
    """Report processor, memory and disk, and this process's share of them."""
    from tinyldm.threads import cores

    quota, free = machine.quota(), machine.free_memory()
    disk = shutil.disk_usage(".").free
    facts = {
        "system": platform.platform(),
        "processor": machine.processor(),
        "cores": os.cpu_count(),
        "cores of this process": cores(),
        "cores' worth of time": "no limit" if quota is None else quota,
        "free memory (GB)": "unknown" if free is None else round(free / 1e9, 1),
        "free disk in this folder (GB)": round(disk / 1e9, 1),
    }
    problems = []
    if cores() < os.cpu_count():
        problems.append(
            f"this process may use {cores()} of {os.cpu_count()} cores: start it without taskset, "
            "or ask for more of them"
        )
    if quota is not None and quota < cores():
        problems.append(
            f"the container grants the time of {quota:g} cores to threads on {cores()}, which "
            "then wait for one another: give it more, or start with taskset -c "
            f"0-{max(1, int(quota)) - 1}"
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > os.cpu_count() / 2:
        problems.append(
            f"the machine was busy in the last minute (load {load:.1f} on {os.cpu_count()} cores), "
            "so the speeds measured here may be too low: close other programs"
        )
    if disk < DEMO_DISK:
        problems.append(
            f"{disk / 1e9:.2f} GB are free on this disk, a run of the demo needs "
            f"{DEMO_DISK / 1e9:.2f}: make room, or take an --out on another"
        )
    return facts, problems


def arithmetic(device: str) -> Finding:
    """Report what computes: the BLAS library and its threads, preset variables, and the GPU."""
    from threadpoolctl import threadpool_info

    from tinyldm.kernels.cpu.processes import PRESET, available
    from tinyldm.threads import cores, describe_device

    threads = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    preset = {name: os.environ[name] for name in (CORE, PRESET, *THREADS) if name in os.environ}
    facts = {
        "CPU": describe_device(),
        "processes that share a training or sampling step": available(),
        "threads of any other batch, with one of BLAS each": cores(),
        "threads that share the operations on a single image": cores(),
        "threads of BLAS in its matrix products": max(threads, default="unknown"),
        "preset": " ".join(f"{name}={value}" for name, value in preset.items()) or "nothing",
    }
    problems = []
    if threads and max(threads) != cores():
        names = " ".join(name for name in THREADS if name in preset)
        effect = "uses fewer cores than there are"
        if max(threads) > cores():
            effect = "has threads that wait for one another"
        cure = f"unset {names}" if names else f"export OPENBLAS_NUM_THREADS={cores()}"
        problems.append(
            f"BLAS uses {max(threads)} threads on {cores()} cores, so sampling one image {effect} "
            f"(training is not affected): {cure}"
        )
    gpu, found = graphics(device)
    return facts | gpu, problems + found


def graphics(device: str) -> Finding:
    """Report CuPy and its GPUs. Their absence is a problem only where one was to be used."""
    from tinyldm.backend import DeviceError, gpus
    from tinyldm.threads import describe_device

    try:
        return {"GPU": describe_device("cuda")} | {
            f"GPU {i}": gpu for i, gpu in enumerate(gpus())
        }, []
    except DeviceError as error:
        installed = not isinstance(error.__cause__, ImportError)
        meant = device == "cuda" or installed or shutil.which("nvidia-smi")
        return {"GPU": "none that CuPy can use"}, [str(error)] if meant else []


def speed(device: str) -> Finding:
    """Measure a matrix product, and estimate the demo."""
    from tinyldm.threads import cores

    rate = sgemm()
    facts = {"matrix products (GF/s)": round(rate, 1)}
    problems = []
    if rate < SLOW * cores():
        problems.append(
            f"matrix products reach only {rate:.0f} GF/s: NumPy has no fast BLAS, or the machine "
            f"is busy: {sys.executable} -m pip install --force-reinstall numpy"
        )
    if CORE in os.environ:
        without = sgemm_without(CORE)
        facts[f"without {CORE} (GF/s)"] = round(without, 1)
        if without > 1.2 * rate:
            problems.append(
                f"{CORE}={os.environ[CORE]} holds matrix products to {rate:.0f} GF/s, without it "
                f"they reach {without:.0f}: unset {CORE}"
            )
    demo, found = demonstration(device)
    return facts | demo, problems + found


def demonstration(device: str) -> Finding:
    """Estimate what `tinyldm demo` takes on this machine, and what to expect of it."""
    from tinyldm.backend import DeviceError
    from tinyldm.training.estimate import estimate_run
    from tinyldm.training.presets import PRESETS

    config = PRESETS["demo"]
    try:
        demo = estimate_run(config, config.images, device)
    except DeviceError:
        return {}, []  # already among the problems
    except Exception as error:  # a GPU without headers to compile with, or without free memory …
        return {}, [f"the demo cannot be timed on {device}: {type(error).__name__}: {error}"]
    # Two copies: all images, and those that are trained on.
    images = 2 * config.images * 3 * math.prod(config.sides)
    facts = {
        **{f"{name} step (ms)": round(1e3 * s, 1) for name, s in demo.step_seconds.items()},
        "the demo trains": machine.duration(demo.seconds),
        "the demo's steps": " + ".join(f"{number:,}" for number in demo.steps.values()),
        "the demo's memory (GB)": round((demo.memory + images) / 1e9, 1),
    }
    problems = []
    if demo.enough:
        problems.append(
            "five minutes are too short for 95 % of the demo's captions to come out right: "
            f"tinyldm demo --minutes {demo.enough}"
        )
    if demo.free is not None and demo.memory - demo.held + images > demo.free:
        problems.append(
            f"the demo needs {machine.gigabytes(demo.memory + images)} of memory and "
            f"{machine.gigabytes(demo.free)} are free: close other programs, or give the container "
            "more"
        )
    return facts, problems


def sgemm(side: int = 1024, seconds: float = 0.3) -> float:
    """Measure the rate of NumPy's matrix product, which limits everything here, in GF/s (10⁹/s)."""
    import numpy as np

    a = np.ones((side, side), np.float32)
    end, best = time.perf_counter() + seconds, math.inf
    while best == math.inf or time.perf_counter() < end:
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e9


def sgemm_without(name: str) -> float:
    """Measure the rate in a process whose environment lacks a variable; 0 if that fails."""
    environment = {key: value for key, value in os.environ.items() if key != name}
    done = subprocess.run(
        [sys.executable, "-c", "from tinyldm.cli.doctor import sgemm; print(sgemm())"],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout) if done.returncode == 0 else 0.0
