"""The protocol that pairs a forward pass with its backward pass.

A function on arrays returns its result and a closure that carries the gradient back through it:

    y, backward = linear(x, w, b)
    dx, dw, db = backward(dy)

`dz` always is the gradient of the loss with respect to `z`. A layer gives names to the arrays. It
reads its parameters from one dict and adds their gradients to another, which the caller owns:

    y, backward = layer(params, x)
    dx = backward(dy, grads)

Nothing is remembered between calls: what the backward pass needs lives in the closure alone. It
may be called once, and what it kept is freed as the gradient passes.

Each function here is plain mathematics. `tinyldm.kernels` may register faster versions of it, which
then run in its place where they apply.
"""

import contextlib
import contextvars
import functools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, ParamSpec

from tinyldm.backend import Array

Params = dict[str, Array]  # by full name: parameters, and their gradients
Backward = Callable[..., Any]  # dy → dx, or (dy, grads) → dx; None takes its place under `no_grad`
Arguments = ParamSpec("Arguments")

_recording = contextvars.ContextVar("recording", default=True)


@contextlib.contextmanager
def _set_recording(value):
    token = _recording.set(value)
    try:
        yield
    finally:
        _recording.reset(token)


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Record nothing within `with no_grad():`: functions return `(y, None)`, nothing is kept."""
    return _set_recording(False)


class Kernel(NamedTuple):
    """A faster version of a plain function, with the same arguments and results."""

    function: Callable
    cost: Callable[..., float]  # of a call with these arguments; math.inf where it does not apply


KERNELS: dict[str, list[Kernel]] = {}  # full name of a plain function → its kernels
PLAIN = os.environ.get("TINYLDM_KERNELS") == "plain"
use_kernels = contextvars.ContextVar("use_kernels", default=not PLAIN)


def replaceable(function: Callable, finish: Callable | None = None) -> Callable:
    """Let the cheapest kernel that applies run in place of the plain `function`.

    finish: `finish(result, name of the function) → result`, whichever ran.
    """
    name = function.__name__
    kernels = KERNELS.setdefault(f"{function.__module__}.{function.__qualname__}", [])

    @functools.wraps(function)
    def call(*args, **kwargs):
        chosen = function
        if kernels and use_kernels.get():
            least = math.inf
            for kernel, cost_of in kernels:
                cost = cost_of(*args, **kwargs)
                if cost < least:
                    chosen, least = kernel, cost
        result = chosen(*args, **kwargs)
        return result if finish is None else finish(result, name)

    return call


def is_recording() -> bool:
    """Return whether functions keep what their backward pass needs: not within `no_grad`."""
    return _recording.get()


def differentiable(
    function: Callable[Arguments, tuple[Array, Backward]],
) -> Callable[Arguments, tuple[Array, Backward]]:
    """Make `function`, which returns `(y, backward)`, obey `no_grad` and the call-once rule.

    A second call of `backward` raises RuntimeError. Kernels may replace it, see `replaceable`.
    """
    return replaceable(function, _once)


def _once(result, name):
    """Wrap (y, backward) so that the backward pass runs once, or is None under `no_grad`."""
    y, backward = result
    if not _recording.get():
        return y, None

    def run(*dy, **options):
        nonlocal backward
        if backward is None:
            raise RuntimeError(f"the backward pass of {name} was called a second time")
        # The only reference is given up, so what the pass kept is freed as soon as it has run.
        step, backward = backward, None
        return step(*dy, **options)

    return y, run


@differentiable
def recompute(
    layer: Callable[..., tuple[Array, Backward]], params: Params, *inputs: Array | None
) -> tuple[Array, Backward]:
    """Run `layer(params, *inputs)` without keeping activations; compute them again when needed.

    Known as activation or gradient checkpointing. Trades one more forward pass for the memory of
    everything inside `layer` (Chen et al. 2016,
    "Training deep nets with sublinear memory cost").
    """
    with no_grad():
        y, _ = layer(params, *inputs)

    def backward(dy, grads):
        with _set_recording(True):
            _, layer_back = layer(params, *inputs)
        return layer_back(dy, grads)

    return y, backward


# ---------------------------------------------------------------------------------------- gradients


class Grads(dict):
    """A dict that accepts gradients only of the parameters named in `only`.

    The work for the others is not done. `None` in place of the dict asks for the gradients of the
    inputs alone, and a plain dict takes all.
    """

    def __init__(self, only: Iterable[str]):
        super().__init__()
        self.only = frozenset(only)


def wants_grad(grads: Params | None, *names: str) -> bool:
    """Return whether the gradient of any of the named parameters is asked for."""
    if isinstance(grads, Grads):
        return not grads.only.isdisjoint(names)
    return grads is not None


def add_grad(grads: Params | None, name: str, dw: Array) -> None:
    """Add `dw`, a fresh array that `grads` may keep, to the gradient of the parameter `name`."""
    if not wants_grad(grads, name):
        return
    if name in grads:
        grads[name] += dw
    else:
        grads[name] = dw
