"""Gradient checks: `check_gradients` compares a backward pass with its forward pass.

Each tensor is moved along a random direction u, and each output is weighted by a random dy. Then
Σ dy · (derivative of f along u), which the forward pass alone gives, must equal Σ dx · u, which
the backward pass gives. The derivative is taken by the complex step where the function is analytic.
A central difference confirms it, as NumPy loses imaginary parts in silence (`abs`, `std`).
Elsewhere it is taken by a ladder of differences, which comes with an error bar. So there are three
verdicts: right, wrong, and cannot tell.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from tinyldm.testing.contract import at_the_point, gradients_of
from tinyldm.testing.derivatives import (
    FIRST,
    NotAnalytic,
    agree,
    complex_step,
    differences,
    largest_of,
    one_sided,
)
from tinyldm.testing.diagnosis import Fault, report
from tinyldm.testing.problem import Check, GradientError

METHODS = ("auto", "complex", "central")
EXACT, ROUGH = 1e-10, 1e-7  # default tolerances, for the complex step and for differences
SINGLE = 1e-4  # for functions of float32
CLEAR = 1e-3  # an error bar above this share of the terms leaves a gradient undecided
ROUNDED = 1e-9  # the most that rounding may reach, relative to `Check.largest`
SEEN = 1e-3  # a derivative below this share of the largest is confirmed by itself
OTHER_FIRST = (0.7 * FIRST, 0.53 * FIRST)  # first steps of other ladders, to see noise by
MOST_KINKS = 512  # entries of a tensor with kinks, of which each is looked at
NUDGES = 4  # calls with inputs that differ in the last bits, to see how far rounding reaches


class Undecided(GradientError):
    """A gradient may be right or wrong: the message says why it cannot be told."""


def check_gradients(
    f: Callable,
    inputs: Any,
    params: dict | None = None,
    *,
    vjp: Callable | None = None,
    rng: int | Generator = 0,
    tol: float | None = None,
    method: str = "auto",
) -> dict[str, float]:
    """Check the backward pass of `f` against derivatives of its forward pass.

    f: `f(*inputs) → (y, backward)` with `backward(dy) → the gradients of the inputs`, or with
        `params` a layer: `f(params, *inputs)` and `backward(dy, grads)`, which adds to `grads`.
    inputs: one argument, or a list of them: arrays of any library, numbers, and tuples, lists and
        dicts of them. Integers, booleans and None are passed through.
    vjp: `vjp(inputs, dy) → the gradients of the inputs`, for a plain function `f(*inputs) → y`.
    rng: seed or numpy.random.Generator, for the random directions and the random dy.
    tol: largest accepted mismatch, relative to the sizes of the terms that are summed; by default
        1e-10 for the complex step, 1e-7 for differences, 1e-4 in float32.
    method: "complex" step, "central" differences, or "auto": the first where it holds.

    All is computed in float64; where `f` refuses that or rounds it, float32 inputs stay float32.
    Every floating input and every parameter must get a gradient: bind what should get none with
    functools.partial. Returns {tensor: its mismatch}, relative to what is summed or, where that is
    rounding alone, as of zeros, to the largest gradient. Raises GradientError, which names all that
    are wrong, with the likely cause, and Undecided where right or wrong cannot be told.
    """
    __tracebackhide__ = True
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    try:
        return _check(f, inputs, params, vjp, np.random.default_rng(rng), tol, method)
    except GradientError as error:
        raise error.with_traceback(None) from None  # the fault lies in f


def _check(f, inputs, params, vjp, rng, tol, method):
    problem, base = at_the_point(f, inputs, params, vjp)
    dy = {path: _signs_and_sizes(rng, y, problem.dtype) for path, y in base.items()}
    directions = {
        path: _signs_and_sizes(rng, x, problem.dtype) for path, x in problem.tensors.items()
    }
    grads = gradients_of(problem, base, dy)
    check = Check(problem, base, dy, grads, tol, method)
    moved = {path: u for path, u in directions.items() if u.size}
    verdicts = {
        path: _verdict(check, path, moved[path], derivative)
        for path, derivative in _derivatives(check, moved).items()
    }
    faults = [verdict for verdict in verdicts.values() if isinstance(verdict, Fault)]
    wrong = [fault for fault in faults if not fault.undecided]
    if faults:
        kind = GradientError if wrong else Undecided
        raise kind(report(check, wrong or faults))
    return dict.fromkeys(directions, 0.0) | verdicts


# ------------------------------------------------------------------------------------ the verdict


def _verdict(check, path, u, derivative):
    """Compare one gradient with the derivative along u → a Fault or, where it is right, how far."""
    numeric, error, size = derivative.along(check.dy)
    terms = check.grads[path].astype("float64") * u
    ours, scale = float(terms.sum()), float(abs(terms).sum()) + size
    tol = check.tol
    if tol is None:
        tol = EXACT if derivative.exact else SINGLE if check.problem.dtype == "float32" else ROUGH
    apart = abs(numeric - ours)
    mismatch = apart / max(scale, 1e-300)
    if apart <= tol * scale and error <= max(CLEAR, tol) * scale:
        return mismatch
    fault = Fault(path, numeric, ours, error, mismatch, derivative, tol)
    if not derivative.exact:
        fault.error = error = max(error, _noise(check, path, u, numeric))
    if derivative.exact:
        near = apart <= ROUNDED * check.largest  # further apart, it cannot be rounding
        of_rounding = near and _is_rounding(check, path, u, numeric, ours)
        return apart / max(check.largest, 1e-300) if of_rounding else fault
    if apart <= tol * scale + error and error <= CLEAR * scale:
        return mismatch
    weight = sum(float(abs(w * y)[np.isfinite(y)].sum()) for w, y in _pairs(check.dy, check.base))
    if not terms.any() and apart <= error <= ROUGH * weight:
        return 0.0  # as is its derivative: the result does not depend on it
    kinks, between = _kinks(check, path, u, ours, 1e-5 * scale)
    if between and u.size <= MOST_KINKS:
        at = _outside(check, path)
        if at is None:
            return 0.0
        fault.reason = f"at {path}{list(at)} it lies outside of the slopes to both sides"
    elif between:
        fault.undecided = True
        fault.reason = f"{kinks} outputs have a kink here: move the inputs, or take fewer of them"
    elif kinks:
        fault.reason = f"{kinks} outputs have a kink here: it lies outside of both sides"
    elif not np.isfinite(error):
        fault.undecided, fault.reason = True, "no step along it gives a finite number"
    elif (
        apart <= 2 * error + tol * scale
        or error > 10 * CLEAR * scale
        or _sides_differ(check, path, u, numeric, CLEAR * scale)
    ):
        fault.undecided = True
        fault.reason = "a kink is near, or rounding hides the derivative: move the inputs"
    return fault


def _derivatives(check, directions):
    """Take the derivative along each tensor's direction, by the method asked for or the best."""
    problem, base = check.problem, check.base
    exact, found = {}, {}
    if check.method != "central" and problem.dtype != "float32":
        for path, u in directions.items():
            try:
                exact[path] = complex_step(problem, {path: u})
            except NotAnalytic as reason:
                if check.method == "complex":
                    raise GradientError(
                        f'{path}: {reason}; check it with method="central", or "auto"'
                    ) from None
    together = check.method == "complex" or bool(exact) and _confirmed(check, exact, directions)
    sizes = {path: largest_of(derivative.values) for path, derivative in exact.items()}
    seen = SEEN * max(sizes.values(), default=0.0)  # what is smaller is lost among the others
    for path, u in directions.items():
        one = {path: exact[path]} if path in exact else {}
        sure = together and (check.method == "complex" or sizes.get(path, 0.0) > seen)
        if one and (sure or _confirmed(check, one, {path: u})):
            found[path] = exact[path]
            continue
        found[path] = differences(problem, {path: u}, base)
        if one and agree(exact[path].values, found[path], 1e-6, check.base):
            found[path] = exact[path]
    return found


def _confirmed(check, exact, directions):
    """Return whether a difference along all directions at once agrees with the complex steps."""
    along = {path: directions[path] for path in exact}
    rough = differences(check.problem, along, check.base, first=2.0**-9, levels=2)
    sums = {
        name: sum(derivative.values[name] for derivative in exact.values()) for name in check.base
    }
    return agree(sums, rough, 1e-5, check.base)


def _is_rounding(check, path, u, numeric, ours):
    """Return whether two numbers differ by rounding alone, as where large terms cancel.

    An example is a bias before a softmax, whose derivative is zero by mathematics. How far rounding
    reaches is seen by moving all inputs in their last bits.
    """
    reach, rng = 0.0, np.random.default_rng(0)
    for _ in range(NUDGES):
        nudged = {
            name: x * (1 + 4 * np.finfo(x.dtype).eps * rng.choice([-1.0, 1.0], x.shape))
            for name, x in check.problem.tensors.items()
        }
        problem = check.problem.at(nudged)
        y, backward = problem.call(nudged)
        dx = backward(problem.derivatives_of(y, check.dy), {})[path]
        reach = max(reach, abs(float((dx * u).sum()) - ours))
        reach = max(reach, abs(complex_step(problem, {path: u}).along(check.dy)[0] - numeric))
    return abs(numeric - ours) <= 30 * reach


def _pairs(a, b):
    return [(a[path], b[path]) for path in a]


def _kinks(check, path, u, ours, slack):
    """Compare with the derivatives to either side → how many outputs have a kink, ours is between.

    What a function returns as its gradient at a kink is a matter of taste, between the two.
    """
    (forward, far), (backward, near) = one_sided(check.problem, {path: u}, check.base)
    low = high = 0.0
    kinks = 0
    for name, w in check.dy.items():
        a, b, error = w * forward[name], w * backward[name], abs(w) * (far[name] + near[name])
        if not (error <= CLEAR * (abs(a) + abs(b)).max(initial=0.0) + 1e-6 * abs(w)).all():
            return 0, False  # the derivatives to the sides are no better known
        low, high = low + np.minimum(a, b).sum(), high + np.maximum(a, b).sum()
        kinks += int((abs(a - b) > 10 * error + 1e-3 * (abs(a) + abs(b))).sum())
    return kinks, kinks > 0 and bool(low - slack <= ours <= high + slack)


def _sides_differ(check, path, u, numeric, slack):
    """Return whether short steps to either side give other derivatives than the ladder."""
    for values, errors in one_sided(check.problem, {path: u}, check.base):
        with np.errstate(all="ignore"):
            side = sum(float((w * values[name]).sum()) for name, w in check.dy.items())
            error = sum(float((abs(w) * errors[name]).sum()) for name, w in check.dy.items())
        if not abs(side - numeric) <= slack + error:
            return True
    return False


def _outside(check, path):
    """Find an entry whose gradient is not between the slopes to its two sides; None for none.

    Along a direction through many kinks nearly everything is between, so each entry counts.
    """
    grads = check.grads[path]
    for at in np.ndindex(grads.shape):
        unit = np.zeros(grads.shape)
        unit[at] = 1.0
        (forward, far), (backward, near) = one_sided(check.problem, {path: unit}, check.base)
        low = high = slack = 0.0
        for name, w in check.dy.items():
            a, b = w * forward[name], w * backward[name]
            low, high = low + np.minimum(a, b).sum(), high + np.maximum(a, b).sum()
            slack += float((abs(w) * (far[name] + near[name])).sum())
            slack += 1e-5 * float((abs(a) + abs(b)).sum())
        if not low - slack <= grads[at] <= high + slack:
            return at
    return None


def _noise(check, path, u, numeric):
    """Measure how far other ladders of differences lie apart.

    That is more than their error bars where f rounds on its own, or a kink is near.
    """
    others = (differences(check.problem, {path: u}, check.base, first) for first in OTHER_FIRST)
    return 2 * max(abs(other.along(check.dy)[0] - numeric) for other in others)


def _signs_and_sizes(rng, x, dtype):
    """Draw random signs and sizes in 0.5…1.5: no entry of x is left out by chance.

    They have few bits, so that x plus a step along them is hardly rounded.
    """
    grid = 2.0**10 if dtype == "float32" else 2.0**26
    sizes = np.round(rng.uniform(0.5, 1.5, x.shape) * grid) / grid
    return sizes * rng.choice([-1.0, 1.0], x.shape)
