"""The array switch and the threads, as far as they can be seen without a GPU."""

import sys
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from threadpoolctl import threadpool_info

from tinyldm import backend
from tinyldm.backend import DeviceError, array_module, erf, on_host, to_device
from tinyldm.threads import cores, describe_device, map_threads, one_blas_thread

# ---------------------------------------------------------------------------------- arrays, devices


@pytest.mark.parametrize("x", [np.ones(3), np.ones((), "float32"), np.float64(1), np.zeros(0, int)])
def test_numpy_arrays_are_on_the_host(x):
    assert array_module(x) is np
    assert on_host(x)


def test_the_library_is_that_of_the_array(monkeypatch):
    library = types.ModuleType("otherarrays")
    array = type("Array", (), {"__module__": "otherarrays.core"})()
    monkeypatch.setitem(sys.modules, "otherarrays", library)
    assert array_module(array) is library
    assert not on_host(array)


def test_to_device_cpu_copies_nothing_that_is_there():
    x = np.arange(3)
    assert to_device(x, "cpu") is x
    moved = to_device({"a": x, "b": {"c": x}}, "cpu")
    assert moved["a"] is x and moved["b"]["c"] is x


@pytest.fixture
def no_memory_of_cupy():
    backend._cupy.cache_clear()
    yield
    backend._cupy.cache_clear()


def fake_cupy(count_devices):
    class CUDARuntimeError(RuntimeError):
        pass

    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: count_devices(CUDARuntimeError), CUDARuntimeError=CUDARuntimeError
    )
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(runtime=runtime)
    cupy.asarray = lambda x: ("on the GPU", x)
    return cupy


def test_an_unknown_device_is_refused(no_memory_of_cupy):
    for device in ("gpu", "cuda:0", "", None):
        with pytest.raises(DeviceError, match=f'expected "cpu" or "cuda", found {device!r}'):
            to_device(np.ones(2), device)


def test_without_cupy_the_error_says_how_to_get_it(no_memory_of_cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes the import fail
    for ask in (lambda: to_device({"a": np.ones(2)}, "cuda"), lambda: describe_device("cuda")):
        with pytest.raises(DeviceError, match=r'CuPy is not installed; pip install "tinyldm\['):
            ask()


def test_without_a_usable_gpu_the_error_says_so(no_memory_of_cupy, monkeypatch):
    def no_driver(error):
        raise error("cudaErrorNoDevice: no CUDA-capable device is detected")

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(no_driver))
    with pytest.raises(DeviceError, match=r"no usable GPU \(cudaErrorNoDevice"):
        to_device(np.ones(2), "cuda")
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(lambda _: 0))
    with pytest.raises(DeviceError, match="no GPU is visible"):
        to_device(np.ones(2), "cuda")


def test_with_a_gpu_arrays_go_there_and_come_back(no_memory_of_cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(lambda _: 1))
    x = np.ones(2)
    assert to_device({"a": x}, "cuda") == {"a": ("on the GPU", x)}
    there = type("ndarray", (), {"__module__": "cupy", "get": lambda self: x})()
    assert to_device(there, "cpu") is x


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_erf(dtype):
    x = np.linspace(-3, 3, 61).astype(dtype)
    y = erf(x)
    assert y.dtype == dtype
    assert np.array_equal(y, special.erf(x))


# ------------------------------------------------------------------------------------------ threads


@given(st.lists(st.integers()), st.integers(1, 5))
def test_map_threads_is_map(items, workers):
    assert map_threads(lambda i: i * i, items, workers) == [i * i for i in items]
    assert map_threads(lambda i: i * i, iter(items)) == [i * i for i in items]


def test_results_come_in_the_order_of_the_items():
    def slow_first(i):
        time.sleep(0.02 if i == 0 else 0)
        return i

    assert map_threads(slow_first, range(4), 2) == [0, 1, 2, 3]


def test_map_threads_uses_that_many_threads_at_once():
    for workers in (2, 3):
        meeting = threading.Barrier(workers, timeout=10)

        def meet(_, meeting=meeting):
            meeting.wait()  # passes only when all are here
            return threading.current_thread()

        assert len(set(map_threads(meet, range(workers), workers))) == workers


def test_one_item_or_one_worker_stays_in_this_thread():
    def where(_):
        return threading.current_thread()

    here = threading.current_thread()
    assert map_threads(where, range(3), 1) == [here] * 3
    assert map_threads(where, [0], 4) == [here]


def test_an_error_in_a_thread_reaches_the_caller():
    def fail(i):
        if i == 2:
            raise KeyError(f"item {i}")
        return i

    for workers in (1, 2):
        with pytest.raises(KeyError, match="item 2"):
            map_threads(fail, range(4), workers)
    assert map_threads(abs, [-1, 2], 2) == [1, 2]  # and the threads work on


def blas_thread_counts(_=None):
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_the_matrix_products_inside_run_on_one_thread_each():
    before = blas_thread_counts()
    assert map_threads(blas_thread_counts, range(3), 2) == [{1}] * 3
    assert blas_thread_counts() == before
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda i: 1 // i, range(2), 2)
    assert blas_thread_counts() == before


def test_blas_threads():
    before = blas_thread_counts()
    with one_blas_thread():
        assert blas_thread_counts() == {1}
    assert blas_thread_counts() == before


def test_cores_and_description():
    assert cores() >= 1
    line = describe_device()
    assert line.startswith(f"NumPy {np.__version__}, ")
    assert line.endswith(f"{cores()} threads")
    assert "\n" not in line
