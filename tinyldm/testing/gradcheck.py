"""Gradient checks: `check_gradients` compares a backward pass with its forward pass.

The main instrument is the complex step (Squire & Trapp 1998): for an analytic f,

    Im f(x + i h u) / h  =  the derivative of f along u, up to h²

With h = 1e-20 the error h² is nothing, and since nothing is subtracted nothing cancels: the
derivative is right to the last few bits, where a finite difference loses many of them. That
sharpness is what finds a fault in one entry of a million from a single direction.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator

from tinyldm.backend import Array, array_module, to_device
from tinyldm.nn.protocol import Backward, Params

COMPLEX_STEP = 1e-20
CENTRAL_STEP = 1e-3  # for the five-point stencil, whose error falls with its fourth power


class GradientError(AssertionError):
    """A gradient is missing, misshapen or wrong; the message names the tensor and both values."""


def check_gradients(
    f: Callable[..., tuple[Array, Backward]],
    inputs: Array | Sequence[Array | None],
    params: Params | None = None,
    rng: int | Generator = 0,
    tol: float = 1e-10,
    method: str = "complex",
) -> int:
    """Check the backward pass of `f` against derivatives of its forward pass, in float64.

    f: `f(*inputs) → (y, backward)` with `backward(dy) → the gradients of the inputs`, or with
        `params` a layer: `f(params, *inputs)` and `backward(dy, grads)`.
    inputs: an array or a sequence of them; integers, booleans and None are passed through.
    rng: seed or numpy.random.Generator, for the random directions and the random dy.
    tol: largest accepted mismatch, relative to Σ |dx_i u_i| and to the terms of the numeric side.
    method: "complex", or "central" for a function that cannot take complex numbers
        (to be used with a `tol` of 1e-6 or so, since a difference keeps fewer digits).

    Every floating input and every parameter is moved along a random direction of its own, whose
    entries are bounded away from zero, and must get a gradient: bind what should get none with
    functools.partial. Returns how many tensors were checked. Raises GradientError for the first
    one that fails.
    """
    rng = np.random.default_rng(rng)
    inputs = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    # All that can be moved, by name: inputs by their position, parameters by their own names.
    tensors = {i: x for i, x in enumerate(inputs) if _is_floating(x)} | (params or {})
    tensors = {name: x.astype("float64") for name, x in tensors.items()}

    def call(moved):
        moved_inputs = [moved.get(i, x) for i, x in enumerate(inputs)]
        if params is None:
            return f(*moved_inputs)
        return f({name: moved[name] for name in params}, *moved_inputs)

    before = {name: to_device(x, "cpu").copy() for name, x in tensors.items()}
    y, backward = call(tensors)
    if y.dtype != "float64":
        raise GradientError(f"output: float64 inputs must give float64, found {y.dtype}")
    dy = _random_like(rng, y)
    dy_before = to_device(dy, "cpu").copy()
    grads = {}
    returned = backward(dy) if params is None else backward(dy, grads)
    grads |= _by_position(returned, [name for name in tensors if isinstance(name, int)])
    for name, x in (tensors | {"dy": dy}).items():
        if not np.array_equal(to_device(x, "cpu"), before.get(name, dy_before)):
            raise GradientError(f"{_label(name)}: the function wrote into it")
    for name in grads.keys() - tensors.keys():
        raise GradientError(f"{_label(name)}: got a gradient, but there is no such parameter")

    largest = max((np.abs(to_device(dx, "cpu")).sum() for dx in grads.values()), default=0)
    rounding = 1e-15 * np.abs(to_device(dy * y, "cpu")).sum() + 1e-14 * largest
    derivative = {"complex": _complex_step, "central": _central_difference}[method]
    for name, x in tensors.items():
        if name not in grads:
            raise GradientError(f"{_label(name)}: got no gradient")
        dx = to_device(grads[name], "cpu")
        if dx.shape != x.shape or dx.dtype != x.dtype:
            raise GradientError(
                f"{_label(name)}: gradient of shape {dx.shape} {dx.dtype}, "
                f"expected {x.shape} {x.dtype}"
            )
        direction = _random_like(rng, x)
        numeric_terms = to_device(dy * derivative(call, tensors, name, direction), "cpu")
        terms = dx * to_device(direction, "cpu")
        numeric, ours = numeric_terms.sum(), terms.sum()
        # A sum is only as precise as its terms are large. `rounding` is for derivatives that are
        # zero by mathematics (a bias before a softmax), of which rounding is all that is left.
        scale = np.abs(terms).sum() + np.abs(numeric_terms).sum()
        if not abs(numeric - ours) <= tol * scale + rounding:
            raise GradientError(
                f"{_label(name)}: derivative along a random direction is {numeric:.15g}, "
                f"the backward pass says {ours:.15g} "
                f"(mismatch {abs(numeric - ours) / max(scale, 1e-300):.1e} of the terms, "
                f"tol {tol:.0e})"
            )
    return len(tensors)


def _complex_step(call, tensors, name, direction):
    moved = {key: x + 0j for key, x in tensors.items()}
    moved[name] = tensors[name] + 1j * COMPLEX_STEP * direction
    y, _ = call(moved)
    if y.dtype != "complex128":
        raise GradientError(
            f"{_label(name)}: the function turned complex numbers into {y.dtype}; it must stay "
            'analytic, or be checked with method="central"'
        )
    return y.imag / COMPLEX_STEP


def _central_difference(call, tensors, name, direction):
    def shifted(steps):
        y, _ = call(tensors | {name: tensors[name] + steps * CENTRAL_STEP * direction})
        return y

    return (8 * (shifted(1) - shifted(-1)) - (shifted(2) - shifted(-2))) / (12 * CENTRAL_STEP)


def _is_floating(x):
    return x is not None and hasattr(x, "dtype") and x.dtype.kind == "f"


def _random_like(rng, x):
    """Draw random signs and sizes in 0.5…1.5: no entry of x is left out by chance."""
    values = rng.uniform(0.5, 1.5, x.shape) * rng.choice([-1.0, 1.0], x.shape)
    return array_module(x).asarray(values)


def _by_position(returned, positions):
    """Pair the gradients that a backward pass returned with the floating inputs."""
    returned = returned if isinstance(returned, tuple) else (returned,)
    gradients = [dx for dx in returned if dx is not None]
    if len(gradients) != len(positions):
        raise GradientError(
            f"inputs: {len(positions)} of them have a gradient, backward returned {len(gradients)}"
        )
    return dict(zip(positions, gradients, strict=True))


def _label(name):
    return f"input {name}" if isinstance(name, int) else name
