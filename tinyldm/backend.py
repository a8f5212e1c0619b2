"""The array switch: NumPy on the CPU, CuPy on the GPU.

The device follows the data. A function that needs an array library asks the array for it,

    xp = array_module(x)

so there is no global device, and one process can compare both. This is the only file that imports
CuPy, and it does so only when an array is sent to the GPU.
"""

import functools
import importlib
import sys
from types import ModuleType
from typing import TypeVar

import numpy as np

Array = np.ndarray  # or cupy.ndarray, which has the same methods
Arrays = TypeVar("Arrays", bound=Array | dict)  # an array, or a dict of arrays

# Where each array library keeps its special functions, such as `erf`.
SPECIAL_FUNCTIONS = {"numpy": "scipy.special", "cupy": "cupyx.scipy.special"}


class DeviceError(RuntimeError):
    """The requested device is missing; the message says why and what to do."""


def array_module(x: Array) -> ModuleType:
    """Return the library that made the array `x`: `numpy`, or `cupy`."""
    return _modules[type(x)]


class _Modules(dict):
    """Map the type of an array to the library that defines it, each looked up once."""

    def __missing__(self, kind):
        self[kind] = sys.modules[kind.__module__.partition(".")[0]]
        return self[kind]


_modules = _Modules()


def on_host(x: Array) -> bool:
    """Return whether `x` lies in the memory of the CPU."""
    return isinstance(x, (np.ndarray, np.generic))


def erf(x: Array) -> Array:
    """Compute the error function, to the last bits of any floating dtype (complex on CPU only)."""
    library = SPECIAL_FUNCTIONS[array_module(x).__name__]
    return importlib.import_module(library).erf(x)


def to_device(x: Arrays, device: str) -> Arrays:
    """Copy an array, or a dict of arrays, to `device`: "cpu" or "cuda".

    Raises DeviceError where CuPy or a GPU is missing.
    """
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    if device == "cpu":
        return x if on_host(x) else x.get()
    return _cupy(device).asarray(x)


@functools.cache
def _cupy(device):
    if device != "cuda":
        raise DeviceError(f'device: expected "cpu" or "cuda", found {device!r}')
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            'device "cuda": CuPy is not installed; pip install "tinyldm[cuda12]" (or [cuda13], '
            'whichever your driver is), or use device "cpu"'
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(f'device "cuda": CuPy finds no usable GPU ({error})') from error
    if count == 0:
        raise DeviceError('device "cuda": no GPU is visible to CuPy')
    return cupy


def describe_gpu() -> str:
    """Return one line with CuPy's version and the GPU that it uses. Raises DeviceError."""
    cupy = _cupy("cuda")
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return f"CuPy {cupy.__version__} on {name}"


def gpus() -> list[str]:
    """List the GPUs that CuPy sees, a line each. Raises DeviceError where there is none."""
    runtime = _cupy("cuda").cuda.runtime
    version = runtime.driverGetVersion()
    driver = f"driver for CUDA {version // 1000}.{version % 1000 // 10}"
    lines = []
    for i in range(runtime.getDeviceCount()):
        with _cupy("cuda").cuda.Device(i):
            free, total = runtime.memGetInfo()
        name = runtime.getDeviceProperties(i)["name"].decode()
        lines.append(f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {driver}")
    return lines
