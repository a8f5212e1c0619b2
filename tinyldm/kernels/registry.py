"""The registry of kernels: faster versions that replace their plain twins."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from tinyldm.backend import Array
from tinyldm.nn.protocol import KERNELS, Kernel, use_kernels
from tinyldm.threads import sequential

NEVER = float("inf")  # the cost of a call that a kernel cannot do


def on_cpu(x: Array, *_: object, **__: object) -> float:
    """Return the cost of a kernel that does every call whose first array lies on the CPU."""
    return 0.0 if isinstance(x, np.ndarray) else NEVER


def any_device(*_: object, **__: object) -> float:
    """Return the cost of a kernel that does every call, on any device."""
    return 0.0


def kernel(twin: str, cost: Callable[..., float] = on_cpu) -> Callable[[Callable], Callable]:
    """Register the decorated function as a faster version of the plain one named `twin`.

    twin: the name from the package on, such as "nn.norms.layer_norm". cost: of a call with the same
    arguments, about in multiplications of a large matrix product; NEVER where the kernel does not
    apply. The cheapest of all kernels runs, and the plain function where none applies.
    """

    def register(function):
        KERNELS.setdefault(f"tinyldm.{twin}", []).append(Kernel(function, cost))
        return function

    return register


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Run only the plain functions, no kernel and one thread, within `with plain():`.

    For the whole process, set the environment variable TINYLDM_KERNELS to "plain".
    """
    token = use_kernels.set(False)
    try:
        with sequential():
            yield
    finally:
        use_kernels.reset(token)
