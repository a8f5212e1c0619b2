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
from tinyldm.testing.derivatives import COMPLEX_STEP, derive_entry, is_analytic
from tinyldm.testing.nested import is_floating, like, to_numpy
from tinyldm.testing.problem import GradientError

__tracebackhide__ = True  # pytest shows the source of the caller, not this
LENGTHS = [2.0**-k for k in range(3, 17)]  # of steps along a direction, for Taylor's remainder
ROUGH, SINGLE = 1e-6, 1e-2  # of differences, for the Jacobian; in float32
NUDGES = 4  # of all inputs in their last bits, to see how far rounding reaches
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
    worst, nothing = 0.0, {path: np.zeros_like(x) for path, x in v.items()}
    for name in inner:  # one by one, or a large one would hide a small one
        alone = at(nothing | {name: v[name]})
        there, back = [alone[path] * dy[path] for path in base], v[name] * dx[name]
        ours, numeric = float(back.sum()), float(sum(terms.sum() for terms in there))
        scale = float(sum(abs(terms).sum() for terms in (*there, back))) + 1e-300
        mismatch = abs(ours - numeric) / scale
        if not mismatch <= tol:
            raise GradientError(
                f"{name}: not the adjoint\n"
                f"  ⟨f(v), dy⟩ = {numeric:.12g}, ⟨v, dx⟩ = {ours:.12g}\n"
                f"  apart by {mismatch:.1e} of the sum of all sizes, accepted are {tol:.0e}"
            )
        worst = max(worst, mismatch)
    return worst


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
    exact = {path: is_analytic(problem, base, path) for path in problem.tensors}
    whole = _jacobians(problem, base, exact)
    others, rng = [], np.random.default_rng(0)
    worst, wrong, count, says = 0.0, 0, 0, ""
    for (name, path), (numeric, errors, ours) in whole.items():
        accepted = tol if exact[path] else max(tol, ROUGH if problem.dtype != "float32" else SINGLE)
        scale = max(
            abs(numbers[0]).max(initial=0.0) for (_, one), numbers in whole.items() if one == path
        )
        apart = np.maximum(abs(ours - numeric) - errors, 0.0)
        if apart.max(initial=0.0) > accepted * scale:  # it may be rounding, where terms cancel
            others = others or [
                _jacobians(_nudged(problem, rng), base, exact) for _ in range(NUDGES)
            ]
            reach = max(
                float(abs(old - new).max())
                for other in others
                for old, new in zip((numeric, ours), other[name, path][::2], strict=True)
            )
            apart = np.maximum(apart - 100 * reach, 0.0)
        mismatch = apart / (scale + 1e-300)
        count, wrong = count + apart.size, wrong + int((mismatch > accepted).sum())
        if apart.size and mismatch.max() > max(worst, accepted):
            i, j = np.unravel_index(int(mismatch.argmax()), mismatch.shape)
            at = [int(k) for k in np.unravel_index(i, base[name].shape)]
            by = [int(k) for k in np.unravel_index(j, problem.tensors[path].shape)]
            says = (
                f"  the worst is ∂{name}{at} / ∂{path}{by}:\n"
                f"    forward pass {numeric[i, j]:.12g}, backward pass {ours[i, j]:.12g}"
            )
        worst = max(worst, float(mismatch.max(initial=0.0)))
    if wrong:
        raise GradientError(f"wrong Jacobian in {wrong:,} of {count:,} entries\n{says}")
    return worst


def _jacobians(problem, base, exact):
    """Make all Jacobians → {(output, tensor): those of both passes, (outputs, inputs) each}.

    They are that of the forward pass, its error bars, and that of the backward pass.
    """
    rows = {
        name: [_row(problem, base, name, i) for i in np.ndindex(y.shape)]
        for name, y in base.items()
    }
    found = {}
    for path, x in problem.tensors.items():
        columns = [derive_entry(problem, path, j, base, exact[path]) for j in np.ndindex(x.shape)]
        for name, y in base.items():
            shape = (y.size, x.size)
            numeric, errors = (
                np.reshape([part[name].ravel() for part in parts], shape[::-1]).T
                for parts in ([c.values for c in columns], [c.errors for c in columns])
            )
            ours = np.reshape([row[path].ravel() for row in rows[name]], shape).astype("float64")
            found[name, path] = numeric, errors, ours
    return found


def _nudged(problem, rng):
    """Return the problem at a point that differs in the last bits."""
    eps = np.finfo(problem.dtype).eps
    return problem.at(
        {path: (x * (1 + 4 * eps * rng.choice([-1.0, 1.0], x.shape))).astype(problem.dtype)
         for path, x in problem.tensors.items()}
    )  # fmt: skip


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

    def by_differences(direction):
        found = []
        for step in (2e-3, 1e-3):  # extrapolated to 0
            sides = []
            for sign in (1, -1):
                at = {
                    path: x + sign * step * direction[path] for path, x in problem.tensors.items()
                }
                y, backward = problem.call(at)
                sides.append(backward(problem.derivatives_of(y, dy), {}))
            found.append({path: (sides[0][path] - sides[1][path]) / (2 * step) for path in v})
        return {path: (4 * found[1][path] - found[0][path]) / 3 for path in v}

    def compare(of_v, of_w):
        there = [w[path] * of_v[path] for path in v]
        back = [v[path] * of_w[path] for path in v]
        a, b = (float(sum(terms.sum() for terms in side)) for side in (there, back))
        scale = float(sum(abs(terms).sum() for terms in (*there, *back)))
        scale += ZERO * sum(float(abs(dy[path] * y).sum()) for path, y in base.items()) + 1e-300
        return a, b, abs(a - b) / scale

    a, b, mismatch = compare(times(v), times(w))
    if not mismatch <= tol:  # where NumPy loses imaginary parts, differences show what is right
        *_, rough = compare(by_differences(v), by_differences(w))
        if rough <= ROUGH:
            return rough
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
    points = []
    of_grads = sum(float(abs(grads[path] * problem.tensors[path]).sum()) for path in v)
    digits = 4500 * np.finfo(problem.dtype).eps
    for a in LENGTHS:
        moved = {
            path: (problem.tensors[path] + a * u).astype(problem.dtype) for path, u in v.items()
        }
        y = problem.outputs(problem.call(problem.tensors | moved)[0])
        change, scale = 0.0, of_grads
        for path, there in base.items():
            moves = y[path] != there  # what stays, as a mask of −∞ or −1e9, is not rounded either
            with np.errstate(invalid="ignore"):
                change += float((dy[path] * np.where(moves, y[path] - there, 0.0)).sum())
            scale += float(np.where(moves, abs(dy[path] * there), 0.0).sum())
        rest = abs(change - a * first)
        if rest > digits * (scale + abs(a * first)):
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
    drawn = dict(params)
    floating = [name for name, w in params.items() if is_floating(w)]
    for name in floating:
        w = to_numpy(params[name])
        numbers = rng.uniform(0.5, 1.5, w.shape) * rng.choice([-1, 1], w.shape)
        drawn[name] = like(params[name], numbers.astype(w.dtype))
    problem, base = at_the_point(f, inputs, drawn, None)
    dy = {path: rng.normal(size=y.shape) for path, y in base.items()}
    grads = gradients_of(problem, base, dy)
    dead = [name for name in floating if grads[name].size and not grads[name].any()]
    if dead:
        raise GradientError(f"{', '.join(dead)}: the gradient is zero everywhere")
    return len(floating)
