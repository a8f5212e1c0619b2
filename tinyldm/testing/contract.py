"""The contract of a backward pass: all that is checked besides the values of its gradients.

The same call twice gives the same bits, whatever was called in between. Nothing is written into
inputs, parameters or dy. Every tensor gets a gradient of its shape and dtype, of finite numbers,
and a layer adds to what `grads` holds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tinyldm.testing.nested import to_numpy
from tinyldm.testing.problem import GradientError, Problem, Values

__tracebackhide__ = True  # pytest shows the source of the caller, not this


def at_the_point(
    f: Callable, inputs: Any, params: dict | None, vjp: Callable | None
) -> tuple[Problem, Values]:
    """Call f where it is to be checked → the problem in a dtype that f keeps, the outputs."""
    problem = Problem(f, inputs, params, vjp)
    _check_finite(problem.tensors)
    places = problem.places.values()
    single = bool(places) and all(to_numpy(x).dtype == "float32" for x in places)
    try:
        base = _outputs(problem)
        kept = all(y.dtype == problem.dtype for y in base.values())
    except GradientError:
        raise
    except Exception:
        if not single:
            raise
        kept = False
    if not kept and single:
        problem = Problem(f, inputs, params, vjp, "float32")
        base = _outputs(problem)
    for path, y in base.items():
        if y.dtype != problem.dtype:
            raise GradientError(
                f"output {path}: {problem.dtype} inputs must give {problem.dtype}, found {y.dtype}"
            )
        if np.isnan(y).any():
            raise GradientError(f"output {path}: entry {_index(np.isnan(y))} is nan")
    return problem, base


def _outputs(problem):
    outputs = problem.outputs(problem.call(_copies(problem.tensors))[0])
    _check_not_written(problem.made, problem.tensors)
    return _copies(outputs)


def _copies(arrays):
    return {path: x.copy() for path, x in arrays.items()}


def _check_not_written(values, before, d=""):
    for path, x in values.items():
        if not np.array_equal(to_numpy(x), before[path]):
            raise GradientError(f"{d}{path}: the function wrote into it")


def gradients_of(problem: Problem, base: Values, dy: Values) -> Values:
    """Call forward and backward pass, twice, and check all but the values → gradients by path.

    Between the two passes of the first time f is called elsewhere: a backward pass that relies on
    what the last call left behind is found by that.
    """
    found = []
    # Nearby, and in another order: that changes signs, masks and what is largest, too.
    near = {path: x * (1 + 2.0**-10) for path, x in problem.tensors.items()}
    turned = {path: x.ravel()[::-1].reshape(x.shape) for path, x in problem.tensors.items()}
    negative = {path: -x for path, x in problem.tensors.items()}
    for disturb in (True, False):
        weights = _copies(dy)
        y, backward = problem.call(_copies(problem.tensors))
        given = problem.made
        _check_same(problem.outputs(y), base)
        if disturb:
            for values_there in (near, turned, negative):
                _call_elsewhere(problem, values_there)
        found.append(_copies(backward(problem.derivatives_of(y, weights), {})))
        _check_not_written(given, problem.tensors)
        _check_not_written(weights, dy, "d")
    first, second = found
    for path in second.keys() - problem.tensors.keys():
        raise GradientError(f"{path}: got a gradient, but there is no such input or parameter")
    for path, x in problem.tensors.items():
        if path not in second:
            raise GradientError(f"{path}: got no gradient")
        dx = second[path]
        if dx.shape != x.shape or dx.dtype != x.dtype:
            raise GradientError(
                f"{path}: gradient of shape {dx.shape} {dx.dtype}, expected {x.shape} {x.dtype}"
                + _not_summed(dx, x)
            )
        if not np.isfinite(dx).all():
            at = ~np.isfinite(dx)
            raise GradientError(
                f"{path}: entry {_index(at)} of its gradient is {dx[at].flat[0]}, "
                f"{at.sum()} of {dx.size} are no finite numbers"
            )
        if not np.array_equal(first[path], dx):
            left = _left_behind(problem)
            where = f" in {left}" if left else ", or random numbers drawn anew"
            raise GradientError(
                f"{path}: stale: its gradient changes\n  where f is called again before the "
                f"backward pass, which uses what the last call has left behind{where}"
            )
    _check_accumulation(problem, dy, second)
    return second


def _left_behind(problem):
    """Name the attributes of f that a call of it replaces."""
    before = dict(getattr(problem.f, "__dict__", {}))
    problem.call(problem.tensors)
    after = getattr(problem.f, "__dict__", {})
    return ", ".join(name for name, x in after.items() if x is not before.get(name))


def _call_elsewhere(problem, values):
    try:
        problem.call(values)
    except Exception:  # outside of what f is defined for
        return


def _check_same(outputs, base):
    for path, y in base.items():
        if path not in outputs or not np.array_equal(outputs[path], y):
            raise GradientError(
                f"output {path}: two calls with the same inputs give two results: freeze what is "
                "random in it, or what it remembers"
            )


def _check_accumulation(problem, dy, grads):
    """A layer adds to what `grads` holds, so that two uses of a parameter both count."""
    names = [name for name in problem.of_params if name in problem.tensors]
    if not names:
        return
    y, backward = problem.call(problem.tensors)
    given = {name: problem.place(name, np.ones_like(grads[name])) for name in names}
    backward(problem.derivatives_of(y, dy), given)
    for name in names:
        now = to_numpy(given[name])
        if not np.allclose(now, 1 + grads[name], rtol=1e-6, atol=1e-6):
            raise GradientError(
                f"{name}: the backward pass overwrites what grads holds of it; it must add, so "
                "that two uses of a parameter both count"
            )


def _check_finite(tensors):
    for path, x in tensors.items():
        if not np.isfinite(x).all():
            at = ~np.isfinite(x)
            raise GradientError(
                f"{path}: entry {_index(at)} is {x[at].flat[0]}: a gradient is checked at finite "
                "numbers"
            )


def _index(where):
    """Return the first index at which a mask holds, as integers."""
    return tuple(int(i) for i in np.argwhere(where)[0]) if where.ndim else ()


def _not_summed(dx, x):
    extra = dx.ndim - x.ndim
    padded = (1,) * extra + x.shape if extra >= 0 else None
    if padded is None or len(padded) != dx.ndim:
        return ""
    axes = [i for i, (a, b) in enumerate(zip(dx.shape, padded, strict=True)) if a != b]
    if axes and all(padded[i] == 1 for i in axes):
        return f": it was broadcast, so sum its gradient over axis {', '.join(map(str, axes))}"
    return ""
