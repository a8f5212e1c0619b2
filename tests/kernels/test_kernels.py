"""Every kernel is proven against its plain twin, and by a gradient check of its own.

The kernel itself is called, not what would choose it: also for calls that are too small for it.
"""

import contextlib
import math
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gradients import check
from hypothesis import find, given
from hypothesis import strategies as st
from reference import assert_near
from strategies import (
    CUDA_CALLS,
    KERNEL_CALLS,
    LAYOUTS,
    NATURAL,
    block_sizes,
    in_blocks,
    random_array,
)

from tinyldm import kernels
from tinyldm.kernels import plain
from tinyldm.kernels.cached import fixed
from tinyldm.nn import activations, norms
from tinyldm.nn.attention import attention
from tinyldm.nn.conv import conv2d
from tinyldm.nn.norms import group_norm, layer_norm
from tinyldm.nn.protocol import KERNELS, no_grad
from tinyldm.threads import map_threads

TOLERANCE = {"float32": 1e-5, "float64": 1e-11, "complex128": 1e-11}
# Those of functions without a backward pass, and the test file that compares each with its twin.
OTHERS = {
    ("tinyldm.nn.quantize.nearest_codes", "nearest_codes"): "tests/models/test_vq.py",
    ("tinyldm.nn.optim.adamw", "adamw"): "tests/nn/test_optim.py",
    ("tinyldm.nn.optim.adamw", "fused_adamw"): "tests/kernels/test_cuda.py",
    ("tinyldm.nn.optim.global_norm", "fused_global_norm"): "tests/kernels/test_cuda.py",
    ("tinyldm.nn.optim.muon", "muon"): "tests/nn/test_muon.py",
    ("tinyldm.nn.optim.muon", "fused_muon"): "tests/kernels/test_cuda.py",
    ("tinyldm.nn.optim.global_norm", "global_norm"): "tests/nn/test_optim.py",
    ("tinyldm.training.step.value_and_grad", "value_and_grad"): "tests/training/test_step.py",
    ("tinyldm.training.step.gradients", "gradients"): "tests/kernels/test_processes.py",
    ("tinyldm.sampling.pipeline.predictor", "predictor"): "tests/sampling/test_pipeline.py",
    ("tinyldm.sampling.pipeline.predictor", "graph_predictor"): "tests/test_strict.py",
    ("tinyldm.training.step.gradients", "graph_gradients"): "tests/test_strict.py",
}
every_kernel = pytest.mark.parametrize(
    "twin, name", KERNEL_CALLS, ids=[f"{name}-of-{twin}" for twin, name in KERNEL_CALLS]
)


def plain_twin(twin):
    module, _, name = twin.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def results(function, call, dtype="float64", arrange=np.asarray, weights=True):
    """y and the gradients for a dy that depends on the seed alone."""
    y, backward = function(*map(arrange, call.arrays(dtype)), **call.options)
    dy = random_array(np.random.default_rng(call.seed + 1), y.shape, y.dtype)
    gradients = backward(arrange(dy)) if weights else backward(arrange(dy), weights=False)
    return y, *(gradients if isinstance(gradients, tuple) else (gradients,))


def assert_same(found, expected, tol):
    for z, z_expected in zip(found, expected, strict=True):
        assert (z is None) == (z_expected is None)
        if z is not None:
            assert z.dtype == z_expected.dtype
            assert_near(z, z_expected, tol)


def test_no_kernel_is_without_its_proof():
    registered = [(twin, k.function.__name__) for twin, kernels in KERNELS.items() for k in kernels]
    assert len(set(registered)) == len(registered), "two kernels of a function share a name"
    for twin, name in registered:
        assert (twin, name) in KERNEL_CALLS.keys() | CUDA_CALLS.keys() | OTHERS.keys(), (
            f"no strategy in tests/support/strategies.py draws calls of {twin}, the plain twin of "
            f"{name}: add one to FUNCTIONS"
        )
        assert hasattr(plain_twin(twin), "__wrapped__"), f"{twin}: no kernel can replace it"
    assert len(registered) == len(KERNEL_CALLS) + len(CUDA_CALLS) + len(OTHERS)


def test_every_file_of_kernels_is_imported():
    root = Path(kernels.__file__).parent
    names = {file.relative_to(root).with_suffix("") for file in root.rglob("*.py")}
    missing = [name for name in names if name.name != "__init__" and
               ".".join(("tinyldm.kernels", *name.parts)) not in sys.modules]  # fmt: skip
    assert not missing, f"import them in kernels/__init__.py: {missing}"


@every_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(data=st.data(), block=block_sizes)
def test_a_kernel_gives_what_its_twin_gives(twin, name, dtype, data, block):
    call = data.draw(KERNEL_CALLS[twin, name])
    with plain():
        expected = results(plain_twin(twin), call, dtype)
    with in_blocks(block):
        found = results(call.function, call, dtype)
    assert_same(found, expected, TOLERANCE[dtype])


@every_kernel
@given(data=st.data(), block=block_sizes)
def test_gradients(twin, name, data, block):
    call = data.draw(KERNEL_CALLS[twin, name])
    with in_blocks(block):
        check(call, call.arrays(), tol=1e-12)


@every_kernel
@given(data=st.data())
def test_the_size_of_the_blocks_moves_only_the_rounding(twin, name, data):
    call = data.draw(KERNEL_CALLS[twin, name])
    whole = results(call.function, call)
    for block in (1, 200, 2000):
        with in_blocks(block):
            assert_same(results(call.function, call), whole, tol=1e-13)


@every_kernel
@given(data=st.data())
def test_the_same_call_gives_the_same_bits(twin, name, data):
    call = data.draw(KERNEL_CALLS[twin, name])
    first, second = (results(call.function, call, "float32") for _ in range(2))
    for z, again in zip(first, second, strict=True):
        assert z is again is None or np.array_equal(z, again)


@every_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_the_layout_in_memory_does_not_matter(twin, name, layout, data):
    call = data.draw(KERNEL_CALLS[twin, name])
    moved = results(call.function, call, arrange=LAYOUTS[layout])
    assert_same(moved, results(call.function, call), tol=1e-12)


def one_row(x):
    return np.broadcast_to(x[:1], x.shape) if x.ndim else x


@given(calls=st.fixed_dictionaries(KERNEL_CALLS))
def test_inputs_may_be_one_row_seen_again_and_again(calls):
    for call in calls.values():
        copied = results(call.function, call, arrange=lambda x: np.array(one_row(x)))
        assert_same(results(call.function, call, arrange=one_row), copied, tol=1e-12)


@every_kernel
@given(data=st.data())
def test_nothing_is_written_to_and_results_are_new_memory(twin, name, data):
    call = data.draw(KERNEL_CALLS[twin, name])
    inputs = call.arrays()
    for array in inputs:
        array.flags.writeable = False
    y, backward = call.function(*inputs, **call.options)
    assert not any(np.shares_memory(y, x) for x in inputs)
    backward(np.broadcast_to(2.0, y.shape))  # read-only as well


@pytest.mark.parametrize(
    "call",
    [call for call in NATURAL if any(call.function.__name__ in twin for twin, _ in KERNEL_CALLS)],
    ids=lambda call: f"{call.function.__name__}-{call.seed}",
)
def test_the_kernels_that_are_chosen_for_a_small_u_net_are_near_float64(call):
    low, high = (results(call.function, call, dtype) for dtype in ("float32", "float64"))
    for z, exact in zip(low, high, strict=True):
        assert z is exact is None or np.linalg.norm(z - exact) <= 2e-6 * np.linalg.norm(exact)


# ------------------------------------------------------------------------------------------- choice


@every_kernel
def test_a_kernel_is_chosen_for_some_call(twin, name):
    """One that never runs would be proven in vain."""
    function = plain_twin(twin)

    def is_chosen(call):
        inputs = call.arrays("float32")
        with contextlib.ExitStack() as stack:
            if name.startswith("cached_"):
                stack.enter_context(no_grad())
                stack.enter_context(fixed(inputs[0]))
            return chosen(function, *inputs, **call.options) == name

    if not any(is_chosen(call) for call in NATURAL if call.function is function):
        find(KERNEL_CALLS[twin, name], is_chosen)


def chosen(function, *args, **options):
    costs = {
        kernel.function.__name__: kernel.cost(*args, **options)
        for kernel in KERNELS[f"{function.__module__}.{function.__qualname__}"]
    }
    return min(costs, key=costs.get) if min(costs.values()) < math.inf else "plain"


@pytest.mark.parametrize(
    "shape, kernel, options, name",
    [
        ((16, 16, 16, 64), 1, {"padding": 0}, "pointwise"),
        ((16, 16, 16, 64), 1, {"padding": 0, "stride": 2}, "im2col"),
        ((16, 16, 16, 64), 3, {}, "winograd4"),
        ((64, 16, 16, 4), 3, {}, "im2col"),
        ((16, 16, 16, 64), 3, {"stride": 2}, "im2col"),
        ((16, 16, 16, 64), 5, {"padding": 2}, "im2col"),
    ],
)
def test_the_convolution_that_is_chosen(shape, kernel, options, name):
    x, w = np.zeros(shape, "f4"), np.zeros((kernel, kernel, shape[3], 64), "f4")
    assert chosen(conv2d, x, w, **options) == name


def test_within_plain_no_kernel_runs_and_no_thread_is_asked():
    def fail(*_, **__):
        raise ZeroDivisionError

    x, w, b = np.ones((2, 4, 4, 8)), np.ones(8), np.ones(8)
    registered = KERNELS["tinyldm.nn.norms.group_norm"]
    before = registered.copy()
    registered[:] = [kernel._replace(function=fail) for kernel in registered]
    try:
        with plain():
            group_norm(x, w, b, 2, 1e-5)
            threads = map_threads(lambda _: threading.current_thread(), range(4), 2)
        with pytest.raises(ZeroDivisionError):
            group_norm(x, w, b, 2, 1e-5)
    finally:
        registered[:] = before
    assert set(threads) == {threading.current_thread()}


@pytest.mark.parametrize("asked", ["plain", "", "plian"])
def test_the_environment_can_ask_for_the_plain_functions(asked):
    code = "import tinyldm.kernels, tinyldm.nn.protocol as p; print(p.use_kernels.get())"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TINYLDM_KERNELS": asked},
        capture_output=True, text=True,
    )  # fmt: skip
    if asked == "plian":
        assert "TINYLDM_KERNELS: expected \"plain\" or nothing, found 'plian'" in run.stderr
    else:
        assert run.stdout.strip() == str(asked != "plain")


# ----------------------------------------------------------------------------------- single kernels


@given(data=st.data())
def test_group_norm_with_silu_is_group_norm_then_silu(data):
    call = data.draw(KERNEL_CALLS["tinyldm.nn.norms.group_norm_silu", "group_norm_silu"])
    x, w, b = call.arrays()
    h, norm_back = norms.group_norm(x, w, b, **call.options)
    y, silu_back = activations.silu(h)
    dy = random_array(np.random.default_rng(call.seed + 1), y.shape)
    expected = (y, *norm_back(silu_back(dy)))
    assert_same(results(call.function, call), expected, 1e-12)


@pytest.mark.parametrize("side", [1, 8, 31])
@pytest.mark.parametrize("far", [1e2, 1e4])
@pytest.mark.parametrize(
    "norm", [partial(group_norm, groups=2), layer_norm], ids=["group", "layer"]
)
def test_norms_in_float32_far_from_zero(norm, side, far):
    # The variance as a difference, E[x²] − E[x]², would have no right digit here, and a mean that
    # is rounded would leave three at most. The first position is far from all others.
    x = np.random.default_rng(0).normal(far, 1, (2, side, side, 64)).astype("float32")
    x[:, 0, 0] += 30
    one, zero = np.ones(64, "float32"), np.zeros(64, "float32")
    y, _ = norm(x, one, zero, eps=1e-5)
    expected, _ = norm(*(a.astype("float64") for a in (x, one, zero)), eps=1e-5)
    assert np.abs(y - expected).max() < 1e-5


@pytest.mark.parametrize("value", [0.1, 3.3, 100.1, 10000.7])
@pytest.mark.parametrize("d", [64, 768])
def test_a_layer_norm_of_equal_numbers_is_the_shift(value, d):
    x, one, zero = (np.full((5, d), value, "float32"), *(np.full(d, n, "float32") for n in (1, 0)))
    y, backward = layer_norm(x, one, zero, 1e-5)
    _, dw, _ = backward(np.random.default_rng(0).normal(size=x.shape).astype("float32"))
    assert abs(y).max() < 1e-3 and abs(dw).max() < 1e-2


def test_by_default_a_block_of_attention_is_what_fits_the_cache():
    rng = np.random.default_rng(0)
    q, k, v = (random_array(rng, (2, 5, 4)) for _ in range(3))
    expected, _ = attention(q, k, v, 2)
    with in_blocks(7):
        assert_near(attention(q, k, v, 2)[0], expected)
