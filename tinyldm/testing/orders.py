"""Instruments beside `check_gradients`: each finds faults that the others miss, or needs no step.

* `check_linear`, for linear maps: ⟨f(v), dy⟩ = ⟨v, dx⟩, no derivative (Claerbout & Fomel 2014).
* `check_jacobian`: each entry of the Jacobian, for small shapes.
* `check_second_order`: the backward pass, differentiated itself, gives a symmetric Hessian.
* `check_taylor`: what a step of length a leaves over beyond first order falls with a².
* `check_live`: no parameter's gradient is zero.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from tinyldm.testing.contract import at_the_point, gradients_of
from tinyldm.testing.derivatives import COMPLEX_STEP, derive_entry, size_of
from tinyldm.testing.problem import GradientError

__tracebackhide__ = True  # pytest shows the source of the caller, not this
LENGTHS = [2.0**-k for k in range(3, 17)]  # of steps along a direction, for Taylor's remainder
ZERO = 1e-4  # a derivative below this share of the result over the input may be rounding
FIXED = "\n  bind what it is not linear in, as with functools.partial"
SLOPE = 0.1  # how far the slope of the remainder may lie from 2


def check_linear(
    f: Callable,
    inputs: Any,
    params: dict | None = None,
    *,
    vjp: Callable | None = None,
    rng: int | Generator = 0,
    tol: float = 1e-12,
) -> float:
    """Check that `f` is linear in all its inputs together, and that backward is its adjoint.

    Parameters are held as they are. Returns the mismatch of ⟨f(v), dy⟩ and ⟨v, dx⟩, relative to the
    sizes of the terms. Raises GradientError. The arguments are those of `check_gradients`.
    """
    rng = np.random.default_rng(rng)
    problem, base = at_the_point(f, inputs, params, vjp)
    inner = [path for path in problem.tensors if path not in problem.of_params]

    def at(values):
        return problem.outputs(problem.call(problem.tensors | values)[0])

    v, w = ({path: rng.normal(size=problem.tensors[path].shape) for path in inner} for _ in "vw")
    zero = at({path: np.zeros_like(x) for path, x in v.items()})
    of_v, of_w = at(v), at(w)
    of_sum = at({path: 2 * v[path] - 3 * w[path] for path in inner})
    dy = {path: rng.normal(size=y.shape) for path, y in base.items()}
    for path in base:
        expected = 2 * of_v[path] - 3 * of_w[path]
        scale = 1e-300 + max(abs(x).max(initial=0.0) for x in (of_v[path], of_w[path]))
        if abs(zero[path]).max(initial=0.0) > tol * scale:
            raise GradientError(f"{path}: not linear: of zeros it is not zero (a bias?)" + FIXED)
        if abs(of_sum[path] - expected).max(initial=0.0) > 100 * tol * scale:
            raise GradientError(f"{path}: not linear: f(2u − 3v) is not 2 f(u) − 3 f(v)" + FIXED)
    y, backward = problem.at(problem.tensors | v).call(problem.tensors | v)
    dx = backward(problem.derivatives_of(y, dy), {})
    there = [(of_v[path] * dy[path]) for path in base]
    back = [(v[path] * dx[path]) for path in inner]
    ours, numeric = (float(sum(terms.sum() for terms in side)) for side in (back, there))
    scale = float(sum(abs(terms).sum() for terms in (*there, *back))) + 1e-300
    mismatch = abs(ours - numeric) / scale
    if not mismatch <= tol:
        raise GradientError(
            f"{', '.join(inner)}: not the adjoint\n"
            f"  ⟨f(v), dy⟩ = {numeric:.12g}, ⟨v, dx⟩ = {ours:.12g}\n"
            f"  apart by {mismatch:.1e} of the sum of all sizes, accepted are {tol:.0e}"
        )
    return mismatch


def check_jacobian(
    f: Callable,
    inputs: Any,
    params: dict | None = None,
    *,
    vjp: Callable | None = None,
    tol: float = 1e-9,
) -> float:
    """Compare each entry of the Jacobian with that of the backward pass → the worst mismatch.

    It takes a call of `f` for each number in the inputs and parameters, and a backward pass for
    each number in the output: for small shapes. tol: relative to the largest entry of a tensor's
    Jacobian. Raises GradientError. The arguments are those of `check_gradients`.
    """
    problem, base = at_the_point(f, inputs, params, vjp)
    gradients_of(problem, base, {path: np.ones_like(y) for path, y in base.items()})
    rows = {
        (path, i): _row(problem, base, path, i)
        for path in base
        for i in np.ndindex(base[path].shape)
    }
    most = max((abs(y).max(initial=0.0) for y in base.values()), default=0.0)
    worst, wrong, count, says = 0.0, 0, 0, ""
    for path, x in problem.tensors.items():
        columns = {i: derive_entry(problem, path, i, base).values for i in np.ndindex(x.shape)}
        largest = max(
            (abs(d).max(initial=0.0) for c in columns.values() for d in c.values()), default=0
        )
        scale = max(largest, ZERO * most / size_of(x) + 1e-300)
        for (name, i), row in rows.items():
            for j, column in columns.items():
                ours, numeric = float(row[path][j]), float(column[name][i])
                mismatch = abs(ours - numeric) / scale
                count, wrong = count + 1, wrong + (not mismatch <= tol)
                if not mismatch <= max(worst, tol):
                    says = (
                        f"  the worst is ∂{name}{list(i)} / ∂{path}{list(j)}:\n"
                        f"    forward pass {numeric:.12g}, backward pass {ours:.12g}"
                    )
                worst = max(worst, mismatch)
    if wrong:
        raise GradientError(f"wrong Jacobian in {wrong:,} of {count:,} entries\n{says}")
    return worst


def _row(problem, base, path, i):
    """Return the gradients of one output entry."""
    dy = {name: np.zeros(y.shape) for name, y in base.items()}
    dy[path][i] = 1.0
    y, backward = problem.call(problem.tensors)
    return backward(problem.derivatives_of(y, dy), {})


def check_second_order(
    f: Callable,
    inputs: Any,
    params: dict | None = None,
    *,
    vjp: Callable | None = None,
    rng: int | Generator = 0,
    tol: float = 1e-9,
) -> float:
    """Check the Hessian of Σ dy · f that the backward pass implies, by a complex step through it.

    The gradient at x + i h v has the imaginary part h H v. H must be symmetric, ⟨w, H v⟩ =
    ⟨v, H w⟩, which no wrong gradient's Jacobian is but by chance. Needs a backward pass that takes
    complex numbers. Returns the mismatch, relative to the terms' sizes. Raises GradientError.
    """
    rng = np.random.default_rng(rng)
    problem, base = at_the_point(f, inputs, params, vjp)
    dy = {path: rng.normal(size=y.shape) for path, y in base.items()}
    gradients_of(problem, base, dy)
    v, w = ({path: rng.normal(size=x.shape) for path, x in problem.tensors.items()} for _ in "vw")

    def times(direction):
        moved = {
            path: x + 1j * COMPLEX_STEP * direction[path] for path, x in problem.tensors.items()
        }
        y, backward = problem.call(moved)
        at = {path: weight + 0j for path, weight in dy.items()}
        gradients = backward(problem.derivatives_of(y, at, "complex128"), {})
        for path, dx in gradients.items():
            if dx.dtype.kind != "c":
                raise GradientError(
                    f"{path}: the backward pass turned complex numbers into {dx.dtype}"
                )
        return {path: dx.imag / COMPLEX_STEP for path, dx in gradients.items()}

    of_v, of_w = times(v), times(w)
    there = [w[path] * of_v[path] for path in v]
    back = [v[path] * of_w[path] for path in v]
    a, b = (float(sum(terms.sum() for terms in side)) for side in (there, back))
    scale = float(sum(abs(terms).sum() for terms in (*there, *back)))
    scale += ZERO * sum(float(abs(dy[path] * y).sum()) for path, y in base.items()) + 1e-300
    mismatch = abs(a - b) / scale
    if not mismatch <= tol:
        raise GradientError(
            "the Hessian is not symmetric: the backward pass is the gradient of nothing\n"
            f"  ⟨w, H v⟩ = {a:.12g}, ⟨v, H w⟩ = {b:.12g}\n"
            f"  apart by {mismatch:.1e} of the sum of all sizes, accepted are {tol:.0e}"
        )
    return mismatch


def check_taylor(
    f: Callable,
    inputs: Any,
    params: dict | None = None,
    *,
    vjp: Callable | None = None,
    rng: int | Generator = 0,
) -> float:
    """Check that |g(x + a v) − g(x) − a ⟨dx, v⟩| falls with a², for g = Σ dy · f → the slope.

    The slope is that of the logarithms, over the steps at which the remainder is above rounding; it
    is 2 for a right gradient, 1 for a wrong one, and infinite where the smallest step leaves
    nothing over, as of a linear map. Raises GradientError.
    """
    rng = np.random.default_rng(rng)
    problem, base = at_the_point(f, inputs, params, vjp)
    dy = {path: rng.normal(size=y.shape) for path, y in base.items()}
    grads = gradients_of(problem, base, dy)
    v = {path: rng.normal(size=x.shape) for path, x in problem.tensors.items()}
    slope = _slope(problem, base, dy, grads, v)
    if slope < 2 - SLOPE:
        alone = {path: _slope(problem, base, dy, grads, {path: u}) for path, u in v.items()}
        wrong = [path for path, one in alone.items() if one < 2 - SLOPE]
        raise GradientError(
            f"{', '.join(wrong) or 'all together'}: wrong gradient\n"
            f"  what a step leaves over falls with its length to the power {slope:.2f}, where it "
            "must be 2"
        )
    return slope


def _slope(problem, base, dy, grads, v):
    """Fit the slope of the remainder along the directions v, which may leave tensors out."""
    first = sum(float((grads[path] * u).sum()) for path, u in v.items())
    points, scale = [], sum(float(abs(dy[path] * y).sum()) for path, y in base.items())
    scale += sum(float(abs(grads[path] * problem.tensors[path]).sum()) for path in v)
    for a in LENGTHS:
        moved = {path: problem.tensors[path] + a * u for path, u in v.items()}
        y = problem.outputs(problem.call(problem.tensors | moved)[0])
        change = sum(float((dy[path] * (y[path] - base[path])).sum()) for path in base)
        rest = abs(change - a * first)
        if rest > 1e-12 * (scale + abs(a * first)):
            points.append((math.log(a), math.log(rest)))
    points = points[-6:]  # the smallest steps, where the second order leads
    if len(points) < 2 or points[-1][0] != math.log(LENGTHS[-1]):
        return math.inf
    return float(np.polyfit(*np.transpose(points), 1)[0])


def check_live(
    f: Callable,
    inputs: Any,
    params: dict,
    *,
    rng: int | Generator = 0,
) -> int:
    """Check that every parameter of a layer gets a gradient that is not zero → how many there are.

    The parameters are replaced by random numbers of their shapes: at the zeros and ones that layers
    begin with, much of a network is shut off. Raises GradientError, which names all that are dead.
    """
    rng = np.random.default_rng(rng)
    drawn = {
        name: rng.uniform(0.5, 1.5, np.shape(w)) * rng.choice([-1, 1], np.shape(w))
        for name, w in params.items()
    }
    problem, base = at_the_point(f, inputs, drawn, None)
    dy = {path: rng.normal(size=y.shape) for path, y in base.items()}
    grads = gradients_of(problem, base, dy)
    dead = [name for name in drawn if grads[name].size and not grads[name].any()]
    if dead:
        raise GradientError(f"{', '.join(dead)}: the gradient is zero everywhere")
    return len(drawn)
