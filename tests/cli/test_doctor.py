"""The doctor: a healthy machine, each of its illnesses with the cure, and one real examination."""

import json
import os
import shutil
import sys
import types
from collections import namedtuple
from dataclasses import asdict, replace

import pytest
import threadpoolctl

from tinyldm import backend, machine, threads
from tinyldm.backend import DeviceError
from tinyldm.cli import doctor
from tinyldm.training import estimate, presets
from tinyldm.training.config import Config, Stage
from tinyldm.training.estimate import RunEstimate

STAGE = Stage(batch=4, rate=1e-3, warmup=2, ema=0.9, steps=600)
SMALL = Config(
    side=16,
    autoencoder=STAGE,
    denoiser=replace(STAGE, steps=1400),
    vae_widths=(4, 8),
    unet_widths=(8, 16),
    unet_attention=(False, True),
    heads=2,
    groups=4,
    text_width=8,
)
DEMO = RunEstimate(
    step_seconds={"autoencoder": 0.12, "denoiser": 0.135},
    steps={"autoencoder": 600, "denoiser": 1390},
    encoding=20.0,
    memory=800_000_000,
    held=100_000_000,
    free=6_000_000_000,
)
Usage = namedtuple("Usage", "total used free")


def no_gpu(reason="CuPy is not installed; pip install …", cause=ImportError):
    """What the backend does where CuPy, or a GPU for it, is missing."""

    def fails(*args):
        raise DeviceError(f'device "cuda": {reason}') from cause()

    return fails


def blas(threads):
    """What threadpoolctl says of a BLAS library with so many threads."""
    return lambda: [
        {"user_api": "openmp", "num_threads": 99},
        {"user_api": "blas", "num_threads": threads},
    ]


@pytest.fixture
def patient(monkeypatch):
    """`patient.setattr(…)` on a made-up machine where all is well: two cores, and no GPU."""
    for name in (doctor.CORE, *doctor.THREADS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(threads, "describe_device", lambda device="cpu": f"arithmetic on {device}")
    monkeypatch.setattr(backend, "gpus", no_gpu())
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1), raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9e9, 4e9, 5e9))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "quota", lambda: None)
    monkeypatch.setattr(machine, "free_memory", lambda: 6_000_000_000)
    monkeypatch.setattr(threadpoolctl, "threadpool_info", blas(2))
    monkeypatch.setattr(doctor, "sgemm", lambda: 200.0)
    monkeypatch.setattr(doctor, "sgemm_without", lambda name: 200.0)
    monkeypatch.setattr(estimate, "estimate_run", lambda *args: DEMO)
    return monkeypatch


def test_a_healthy_machine(patient):
    report = doctor.examine()
    assert report.problems == []
    assert list(report.facts) == ["versions", "machine", "arithmetic", "speed"]
    text = str(report)
    for line in (
        "  Python: 3.",
        "  numpy: 2.",
        "  cores of this process: 2\n",
        "  free memory (GB): 6.0\n",
        "  CPU: arithmetic on cpu\n",
        "  preset: nothing\n",
        "  matrix products (GF/s): 200.0\n",
        "  denoiser step (ms): 135.0\n",
        "  the demo trains: 4 min 40 s\n",
        "  the demo's steps: 600 + 1,390\n",
        "  the demo's memory (GB): 0.9\n",
    ):
        assert line in text
    assert text.endswith("\n\nno problems found")


def test_programs_can_read_it(patient):
    patient.setattr(machine, "quota", lambda: 1.5)
    report = doctor.examine()
    assert json.loads(report.to_json()) == asdict(report)
    assert len(report.problems) == 1


# ---------------------------------------------------------------------------------------- problems


def the_problem(device="cpu"):
    """The one that is found; it is the end of the text."""
    report = doctor.examine(device)
    (problem,) = report.problems
    assert str(report).endswith(f"\n\nproblems\n  {problem}")
    assert "\n" not in problem
    return problem


def test_a_slower_core_is_preset(patient):
    patient.setenv("OPENBLAS_CORETYPE", "Haswell")
    patient.setattr(doctor, "sgemm_without", lambda name: 390.0)
    problem = the_problem()
    assert problem.startswith("OPENBLAS_CORETYPE=Haswell holds matrix products to 200 GF/s")
    assert problem.endswith("390: unset OPENBLAS_CORETYPE")


def test_a_core_that_costs_nothing_is_no_problem(patient):
    patient.setenv("OPENBLAS_CORETYPE", "Haswell")
    patient.setattr(doctor, "sgemm_without", lambda name: 210.0)
    report = doctor.examine()
    assert report.problems == []
    assert report.facts["arithmetic"]["preset"] == "OPENBLAS_CORETYPE=Haswell"
    assert report.facts["speed"]["without OPENBLAS_CORETYPE (GF/s)"] == 210.0


@pytest.mark.parametrize("name", doctor.THREADS)
def test_too_few_threads_are_preset(patient, name):
    patient.setenv(name, "1")
    patient.setattr(threadpoolctl, "threadpool_info", blas(1))
    problem = the_problem()
    assert "1 threads on 2 cores" in problem and "fewer cores" in problem
    assert problem.endswith(f": unset {name}")


def test_too_many_threads(patient):
    patient.setattr(threadpoolctl, "threadpool_info", blas(64))
    problem = the_problem()
    assert "64 threads on 2 cores" in problem
    assert problem.endswith(": export OPENBLAS_NUM_THREADS=2")


def test_threads_of_an_unknown_blas(patient):
    patient.setattr(threadpoolctl, "threadpool_info", list)
    assert doctor.examine().problems == []


def test_fewer_cores_than_the_machine_has(patient):
    patient.setattr(os, "cpu_count", lambda: 8)
    assert the_problem().startswith("this process may use 2 of 8 cores: start it without taskset")


@pytest.mark.parametrize("quota, cores", [(0.5, "0-0"), (1.5, "0-0")])
def test_less_time_than_cores(patient, quota, cores):
    patient.setattr(machine, "quota", lambda: quota)
    problem = the_problem()
    assert f"{quota} cores to threads on 2" in problem
    assert problem.endswith(f"taskset -c {cores}")


def test_other_programs(patient):
    patient.setattr(os, "getloadavg", lambda: (3.4, 2, 1))
    problem = the_problem()
    assert "load 3.4 on 2 cores" in problem and "close other programs" in problem


def test_a_full_disk(patient):
    patient.setattr(shutil, "disk_usage", lambda path: Usage(9e9, 9e9, 1e7))
    problem = the_problem()
    assert problem.startswith("0.01 GB are free on this disk") and "--out" in problem


def test_a_numpy_without_a_fast_blas(patient):
    patient.setattr(doctor, "sgemm", lambda: 3.0)
    problem = the_problem()
    assert "only 3 GF/s" in problem
    assert problem.endswith(f"{sys.executable} -m pip install --force-reinstall numpy")


def test_too_slow_for_the_demo(patient):
    patient.setattr(estimate, "estimate_run", lambda *args: replace(DEMO, enough=14))
    problem = the_problem()
    assert "five minutes are too short" in problem and problem.endswith(
        ": tinyldm demo --minutes 14"
    )


def test_too_little_memory(patient):
    """The images, 0.13 GB, are not in memory yet as they are when a run is tried."""
    patient.setattr(estimate, "estimate_run", lambda *args: replace(DEMO, free=820_000_000))
    assert the_problem().startswith("the demo needs 0.9 GB of memory and 0.8 GB are free: close")
    patient.setattr(estimate, "estimate_run", lambda *args: replace(DEMO, free=830_000_000))
    assert doctor.examine().problems == []
    patient.setattr(estimate, "estimate_run", lambda *args: replace(DEMO, free=None))
    assert doctor.examine().problems == []


def test_a_package_that_is_missing_or_broken(patient):
    patient.setattr(doctor, "PACKAGES", {"numpy": "numpy", "nonesuch": "tinyldm.nonesuch"})
    assert the_problem() == (
        f"nonesuch cannot be imported: {sys.executable} -m pip install --force-reinstall nonesuch"
    )
    report = doctor.examine()
    assert list(report.facts) == ["versions"], "nothing else would run"
    assert report.facts["versions"]["nonesuch"].startswith("ModuleNotFoundError: ")


# --------------------------------------------------------------------------------------------- GPU


def test_a_gpu_that_was_asked_for_but_is_not_there(patient):
    patient.setattr(estimate, "estimate_run", no_gpu())
    assert "CuPy is not installed; pip install" in the_problem("cuda")


def test_a_gpu_that_cupy_is_missing_for(patient):
    patient.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "CuPy is not installed; pip install" in the_problem()


def test_a_cupy_without_a_gpu(patient):
    patient.setattr(backend, "gpus", no_gpu("CuPy finds no usable GPU", RuntimeError))
    assert "CuPy finds no usable GPU" in the_problem()


def test_a_gpu(patient):
    patient.setattr(backend, "gpus", lambda: ["a fast one", "another"])
    report = doctor.examine("cuda")
    assert report.problems == []
    found = {name: fact for name, fact in report.facts["arithmetic"].items() if "GPU" in name}
    assert found == {"GPU": "arithmetic on cuda", "GPU 0": "a fast one", "GPU 1": "another"}


def test_what_is_said_of_gpus(monkeypatch):
    class Device:
        def __init__(self, i):
            runtime.memGetInfo = lambda: ((20 + i) * 10**9, 80 * 10**9)

        __enter__ = __exit__ = lambda *_: None

    runtime = types.SimpleNamespace(
        driverGetVersion=lambda: 12040,
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda i: {"name": f"Fast {i}".encode()},
    )
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime, Device=Device))
    monkeypatch.setattr(backend, "_cupy", lambda device: cupy)
    assert backend.gpus() == [
        "Fast 0, 20.0 of 80.0 GB free, driver for CUDA 12.4",
        "Fast 1, 21.0 of 80.0 GB free, driver for CUDA 12.4",
    ]


# -------------------------------------------------------------------------------------------- real


def test_this_machine(monkeypatch):
    """On whatever it runs: the facts are there, and a small demo is really tried."""
    monkeypatch.setitem(presets.PRESETS, "demo", SMALL)
    monkeypatch.setattr(doctor, "sgemm", lambda: 100.0)
    report = doctor.examine()
    assert report.facts["versions"]["numpy"][0].isdigit()
    assert report.facts["machine"]["cores of this process"] == threads.cores()
    assert report.facts["arithmetic"]["CPU"].startswith("NumPy ")
    assert report.facts["speed"]["the demo's steps"] == "600 + 1,400"
    assert json.loads(report.to_json()) == asdict(report)


def test_a_matrix_product_has_a_rate():
    assert doctor.sgemm(side=64, seconds=0) > 0


def test_another_process_measures_without_a_variable(monkeypatch):
    """The child fails if it finds the variable, and then there is no rate."""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    seen = []

    def run(command, env, **others):
        seen.append(env.keys() & {"OPENBLAS_CORETYPE", "PATH"})
        return types.SimpleNamespace(returncode=len(seen) - 1, stdout="390.5\n")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.sgemm_without("OPENBLAS_CORETYPE") == 390.5
    assert doctor.sgemm_without("OPENBLAS_CORETYPE") == 0
    assert seen == [{"PATH"}] * 2


def test_a_real_process_measures_something():
    assert doctor.sgemm_without("OPENBLAS_CORETYPE") > 0
