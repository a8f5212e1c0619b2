"""The kernels for a GPU, proven without one: kernels.cu runs on the CPU, see cuda_on_cpu.py.

They are of float32 alone, so their values and gradients are compared with those of the plain twin
in float64, which complex steps have proven.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
import strict
from cuda_calls import (
    examples,
    far_from_zero,
    of_twin,
    plain_twin,
    results,
    small,
    there,
    with_barriers,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import CUDA_CALLS, LAYOUTS, seeds

from tinyldm.kernels import plain
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.kernels.cuda import activations, adamw, launch, muon
from tinyldm.nn import optim
from tinyldm.nn.protocol import KERNELS
from tinyldm.testing import check_gradients

pytestmark = cuda_on_cpu.needs_compiler
TOLERANCE = 1e-5  # of the largest element
every_kernel = pytest.mark.parametrize(
    "twin, name", CUDA_CALLS, ids=[name for _, name in CUDA_CALLS]
)


def assert_near(found, expected):
    for x, wanted in zip(found, expected, strict=True):
        assert (x is None) == (wanted is None)
        if x is not None:
            assert x.dtype == "float32" and x.shape == wanted.shape
            error = np.abs(x - wanted).max(initial=0)
            assert error <= TOLERANCE * (1 + np.abs(wanted).max(initial=0))


@every_kernel
@given(data=st.data(), cut=st.booleans())
def test_a_kernel_gives_what_its_twin_gives(twin, name, data, cut):
    call = data.draw(CUDA_CALLS[twin, name])
    with small(cut):
        assert_near(results(call), of_twin(plain_twin(twin), call))


@every_kernel
def test_gradients_by_differences(twin, name):
    for call in examples(twin, name):
        options = {name: there(x) for name, x in call.options.items()}

        def function(*arrays, call=call, options=options):
            if any(x.dtype != "float32" for x in arrays):
                raise TypeError("expected float32")
            return call.function(*arrays, **options)

        check_gradients(function, [there(x) for x in call.arrays()], method="central", tol=0.01)


@every_kernel
@given(data=st.data(), cut=st.booleans())
def test_the_same_call_gives_the_same_bits(twin, name, data, cut):
    call = data.draw(CUDA_CALLS[twin, name])
    with small(cut):
        for x, again in zip(results(call), results(call), strict=True):
            np.testing.assert_array_equal(x, again)


@every_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_the_layout_in_memory_does_not_matter(twin, name, layout, data):
    call = data.draw(CUDA_CALLS[twin, name])
    assert_near(results(call, LAYOUTS[layout]), results(call))


@every_kernel
@given(data=st.data())
def test_nothing_is_written_to_and_results_are_new_memory(twin, name, data):
    call = data.draw(CUDA_CALLS[twin, name])

    def read_only(x):
        x.flags.writeable = False
        return x

    results(call, read_only)


@every_kernel
@given(data=st.data())
def test_without_the_gradients_of_weights(twin, name, data):
    call = data.draw(CUDA_CALLS[twin, name])
    if "w" not in call.shapes:
        return
    y, dx, *others = results(call)
    y_again, dx_again, *left_out = results(call, weights=False)
    np.testing.assert_array_equal(y, y_again)
    np.testing.assert_array_equal(dx, dx_again)
    assert left_out == [None] * len(others)


@every_kernel
def test_a_kernel_is_chosen_for_float32_on_a_gpu_alone(twin, name):
    def chosen(x):
        calls = {"adamw": (), "attention": (x, x, x, 1), "embedding": (ids_of(x), x)}
        args = calls.get(twin.rpartition(".")[2], (x, x, x))
        costs = {k.function.__name__: k.cost(*args) for k in KERNELS[twin]}
        return min(costs, key=costs.get) == name and min(costs.values()) < 0

    def ids_of(x):
        return strict.asarray(np.zeros(1, int)) if isinstance(x, strict.ndarray) else np.zeros(1)

    x = np.ones((1, 1, 1, 1) if "conv2d" in twin else (1, 1, 1), "float32")
    assert chosen(strict.asarray(x))
    assert not chosen(strict.asarray(x.astype("float64"))) and not chosen(x)


def test_norms_far_from_zero():
    for twin, call in far_from_zero():
        assert_near(results(call), of_twin(twin, call))


# ---------------------------------------------------------------------------------- the optimizer


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=5),
    left_out=st.integers(0, 4), steps=st.integers(1, 3), seed=seeds, cut=st.booleans(),
)  # fmt: skip
def test_adamw_takes_the_steps_of_its_twin(shapes, left_out, steps, seed, cut):
    rng = np.random.default_rng(seed)
    params = {f"p{i}": rng.normal(size=shape).astype("f4") for i, shape in enumerate(shapes)}
    first = [f"p{i}" for i in range(min(left_out, len(shapes) - 1)) if len(shapes[i]) > 1]
    on_device = {name: strict.asarray(w) for name, w in params.items()}
    groups = [Flat(on_device, first=first) for _ in range(4)]  # w, m, v, average
    groups[1].flat.fill(0), groups[2].flat.fill(0)
    w, m, v, average = groups
    exact = {name: x.astype("f8") for name, x in params.items()}
    moments, mean = optim.adam_state(exact), {name: x.copy() for name, x in exact.items()}
    for step in range(steps):
        grads = {n: rng.normal(size=x.shape).astype("f4") for n, x in params.items()}
        grads = {n: g for n, g in grads.items() if n not in first}
        scale, settings = np.float32(rng.uniform(0.1, 2)), {"decay": 0.1, "ema": 0.9}
        there_ = {n: strict.asarray(g) for n, g in grads.items()}
        factor = strict.asarray(scale) if step % 2 else float(scale)
        with small(cut), strict.counting() as counts:
            adamw.fused_adamw(w, there_, {"m": m, "v": v}, average, step, 0.1, factor, **settings)
            norm = adamw.fused_global_norm(there_)
        assert (counts.synchronisations, counts.uploads) == (0, 0)
        grads = {n: g.astype("f8") for n, g in grads.items()}
        with plain():
            optim.adamw(exact, grads, moments, mean, step, 0.1, float(scale), **settings)
            np.testing.assert_allclose(norm.get(), optim.global_norm(grads), rtol=1e-5)
        for flat, named in ((w, exact), (m, moments["m"]), (v, moments["v"]), (average, mean)):
            for name, x in named.items():
                np.testing.assert_allclose(flat[name].get(), x, rtol=1e-4, atol=1e-5)


@given(
    shapes=st.lists(
        st.one_of(st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(1, 3)] * 4)),
        min_size=1, max_size=12,
    ),
    left_out=st.integers(0, 2), seed=seeds, cut=st.booleans(),
)  # fmt: skip
def test_muon_takes_the_steps_of_its_twin(shapes, left_out, seed, cut):
    rng = np.random.default_rng(seed)
    params = {f"p{i}": rng.normal(size=shape).astype("f4") for i, shape in enumerate(shapes)}
    others = {f"other{i}": rng.normal(size=3).astype("f4") for i in range(left_out)}
    device = {name: strict.asarray(w) for name, w in (params | others).items()}
    w, m, average = (Flat(device, first=params) for _ in range(3))
    exact, moments, mean = ({n: x.astype("f8") for n, x in params.items()} for _ in range(3))
    for step in range(2):
        grads = {n: rng.normal(size=x.shape).astype("f4") for n, x in params.items()}
        scale = np.float32(rng.uniform(0.1, 2))
        there_ = {n: strict.asarray(g) for n, g in grads.items()}
        with small(cut), strict.counting() as counts:
            factor = strict.asarray(scale) if step else float(scale)
            muon.fused_muon(w, there_, m, average, step, 0.1, factor, 0.9)
        assert (counts.synchronisations, counts.uploads) == (0, step)
        with plain():
            grads = {n: g.astype("f8") for n, g in grads.items()}
            optim.muon(exact, grads, moments, mean, step, 0.1, float(scale), 0.9)
        for flat, named in ((w, exact), (m, moments), (average, mean)):
            for name, x in named.items():
                np.testing.assert_allclose(flat[name].get(), x, rtol=1e-3, atol=1e-4)
    for name, x in others.items():
        np.testing.assert_array_equal(w[name].get(), x)


# -------------------------------------------------------------------------------- the file itself

SOURCE = launch.SOURCE.read_text()
BARRIERS = [found.start() for found in re.finditer(r"__syncthreads\(\);", SOURCE)]


@pytest.mark.slow
@pytest.mark.parametrize("at", BARRIERS)
def test_each_barrier_is_needed_and_missed(at, monkeypatch):
    """Without it numbers are wrong, or threads wait for others that have ended."""
    module = cuda_on_cpu.RawModule(SOURCE[:at] + SOURCE[at:].replace("__syncthreads();", "", 1))

    def right():
        try:
            for twin, call in with_barriers():
                for cut in (False, True):
                    with small(cut):
                        assert_near(results(call), of_twin(twin, call))
        except (AssertionError, RuntimeError):
            return False
        return True

    assert right()
    monkeypatch.setattr(launch, "_function", lambda xp, name: module.get_function(name))
    assert not right()


def test_the_source_and_its_launcher_agree():
    assert f"#define THREADS {launch.THREADS} " in SOURCE
    kinds = {name.lower(): int(i) for name, i in re.findall(r"#define ([A-Z_]*LU) (\d)", SOURCE)}
    assert kinds == activations.KINDS
    started = set(re.findall(r'(?:launch|each|each_row)\(\s*"(\w+)"', "".join(
        file.read_text() for file in Path(launch.__file__).parent.glob("*.py"))))  # fmt: skip
    assert started == {name for name, _ in cuda_on_cpu.KERNEL.findall(SOURCE)}


SANITIZED = Path(cuda_on_cpu.__file__).with_name("sanitized.py")
# What is planted, and the sanitizer that must say so.
FAULTS = {
    "thread": "__syncthreads();\n        if (t < count - half) shared[t] +=>\n"
    "        if (t < count - half) shared[t] +",
    "address": "i < (count); =>i <= (count); ",
}


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("sanitizer", FAULTS)
def test_threads_do_not_race_and_stay_in_their_arrays(sanitizer, planted):
    """ThreadSanitizer and AddressSanitizer find nothing, but a fault that was planted."""
    short = {"thread": "tsan", "address": "asan"}[sanitizer]
    find = [cuda_on_cpu.COMPILER, f"-print-file-name=lib{short}.so"]
    library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    found = {
        "LD_PRELOAD": library,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [sys.executable, SANITIZED, sanitizer, *[FAULTS[sanitizer]] * planted]
    run = subprocess.run(command, env=os.environ | options | found,
                         capture_output=True, text=True)  # fmt: skip
    said = f"{sanitizer.title()}Sanitizer"
    assert (said in run.stderr) == planted == (run.returncode != 0), run.stderr
    assert ("every kernel has run" in run.stdout) != planted


def gpu_compiler():
    """Return a function that compiles for an architecture by NVRTC or nvcc; neither needs a GPU."""
    if importlib.util.find_spec("cupy"):
        from cupy.cuda.compiler import _NVRTCProgram

        def compiled(architecture, folder):
            program = _NVRTCProgram(SOURCE, "kernels.cu", method="cubin")
            return program.compile((f"--gpu-architecture={architecture}", *launch.OPTIONS))[0]

        return compiled

    def compiled(architecture, folder):
        command = ["nvcc", *launch.OPTIONS, "-cubin", f"-arch={architecture}", "-Werror",
                   "all-warnings", "-o", folder / "kernels.cubin", launch.SOURCE]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return (folder / "kernels.cubin").read_bytes()

    return compiled if shutil.which("nvcc") else None


@pytest.mark.slow
@pytest.mark.skipif(gpu_compiler() is None, reason="neither CuPy nor nvcc, which compile for a GPU")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_the_file_compiles_for_gpus(architecture, tmp_path):
    assert gpu_compiler()(architecture, tmp_path)[:4] == b"\x7fELF"
