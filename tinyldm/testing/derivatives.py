"""Derivatives of a function along a direction, by two methods that know nothing of each other.

The complex step (Squire & Trapp 1998) is for analytic functions:

    Im f(x + i h u) / h  =  the derivative of f along u, up to h²

With h = 1e-20 the error is nothing, and nothing is subtracted, so nothing cancels: the derivative
is right to the last few bits. Central differences are for the rest. A ladder of them with ever
smaller h is extrapolated to h = 0 (Richardson 1911, Ridders 1982), and how far neighbouring values
lie apart tells how good they are: each derivative comes with an error bar.
"""

import contextlib
import warnings
from dataclasses import dataclass

import numpy as np

from tinyldm.testing.problem import Problem, Values

COMPLEX_STEP = 1e-20
RATIO = 4.0  # of a step of the ladder to the next
LEVELS = 11
FIRST = 2.0**-3  # step, relative to the size of what is moved
INSIDE = 1e-11  # of an output: the most that rounding in a function adds to its differences
SAFETY = 4.0  # by which an error bar, which is an estimate, is multiplied


class NotAnalytic(Exception):
    """The complex step does not hold for a function; the message says why."""


@dataclass(frozen=True)
class Derivative:
    """The derivative of each output along a direction, with an error bar of each entry."""

    values: Values
    errors: Values
    exact: bool  # by the complex step

    def along(self, dy: Values) -> tuple[float, float, float]:
        """Sum dy · derivative → (sum, its error bar, the sum of the terms' sizes)."""
        total = sum((dy[path] * d).sum() for path, d in self.values.items())
        error = sum((abs(dy[path]) * e).sum() for path, e in self.errors.items())
        size = sum(abs(dy[path] * d).sum() for path, d in self.values.items())
        return float(total), float(error), float(size)


def complex_step(problem: Problem, directions: Values) -> Derivative:
    """Derive along the directions of some tensors, by the complex step. Raises NotAnalytic."""
    moved = {path: x + 0j for path, x in problem.tensors.items()}
    for path, u in directions.items():
        moved[path] = problem.tensors[path] + 1j * COMPLEX_STEP * u
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", np.exceptions.ComplexWarning)
            y, _ = problem.call(moved)
            outputs = problem.outputs(y)
    except Exception as error:
        raise NotAnalytic(f"it takes no complex numbers ({_line(error)})") from None
    for x in outputs.values():
        if x.dtype.kind != "c":
            raise NotAnalytic(f"it turned complex numbers into {x.dtype}")
        if np.isnan(x.imag).any():
            raise NotAnalytic("its complex result is no number")
    values = {path: x.imag / COMPLEX_STEP for path, x in outputs.items()}
    return Derivative(values, {path: np.zeros(d.shape) for path, d in values.items()}, True)


def differences(
    problem: Problem, directions: Values, base: Values, first: float = FIRST, levels: int = LEVELS
) -> Derivative:
    """Derive along the directions of some tensors, by a ladder of central differences.

    base: the outputs at the point itself. An entry that is infinite there, and stays so, has the
    derivative 0. Where no step gives a number, the error bar is infinite.
    """
    size = max(size_of(problem.tensors[path]) for path in directions)
    eps = np.finfo(problem.dtype).eps
    best = {path: np.zeros(y.shape) for path, y in base.items()}
    errors = {path: np.full(y.shape, np.inf) for path, y in base.items()}
    above = {path: [] for path in base}  # the row of the tableau before
    for k in range(levels):
        step = size * first / RATIO**k
        plus, minus = (_moved(problem, directions, sign * step, base) for sign in (1, -1))
        for path, y in base.items():
            with np.errstate(all="ignore"):
                difference = plus[path].astype("float64") - minus[path].astype("float64")
                constant = np.isinf(y) & (plus[path] == y) & (minus[path] == y)
                largest = np.maximum(abs(plus[path]), abs(minus[path])).astype("float64")
                rounding = np.where(constant, 0.0, 2 * eps * largest / step)
                row = [np.where(constant, 0.0, difference / (2 * step))]
                for j, old in enumerate(above[path], 1):
                    power = RATIO ** (2 * j)
                    row.append((power * row[j - 1] - old) / (power - 1))
                    apart = np.maximum(abs(row[j] - row[j - 1]), abs(row[j] - old))
                    error = apart + rounding
                    better = error < errors[path]  # False for what is no number
                    best[path] = np.where(better, row[j], best[path])
                    errors[path] = np.where(better, error, errors[path])
            above[path] = row
    return Derivative(best, {path: SAFETY * e for path, e in errors.items()}, False)


def derive_entry(
    problem: Problem, path: str, i: tuple[int, ...], base: Values, exact: bool = True
) -> Derivative:
    """Derive with respect to one entry of a tensor; see `derive`."""
    unit = np.zeros(problem.tensors[path].shape)
    unit[i] = 1.0
    return derive(problem, {path: unit}, base, exact)


def derive(problem: Problem, directions: Values, base: Values, exact: bool = True) -> Derivative:
    """Derive along directions: by the complex step where asked and possible, or by differences."""
    with contextlib.suppress(NotAnalytic):
        if exact:
            return complex_step(problem, directions)
    return differences(problem, directions, base)


def agree(values: Values, rough: Derivative, share: float, base: Values) -> bool:
    """Return whether derivatives are those of differences.

    That is within error bars, a share of the largest, and what rounding inside of the function may
    do to each output.
    """
    for name, d in values.items():
        bars = rough.errors[name] + share * abs(d).max(initial=0.0) + INSIDE * abs(base[name])
        if not (abs(d - rough.values[name]) <= bars).all():
            return False
    return True


def largest_of(values: Values) -> float:
    """Return the largest size of all entries."""
    return max((float(abs(x).max(initial=0.0)) for x in values.values()), default=0.0)


def is_analytic(problem: Problem, base: Values, path: str) -> bool:
    """Return whether a difference along a tensor confirms its complex step."""
    if problem.dtype == "float32":
        return False
    rng = np.random.default_rng(0)
    u = {path: rng.choice([-1.0, 1.0], problem.tensors[path].shape)}
    try:
        exact = complex_step(problem, u)
    except NotAnalytic:
        return False
    return agree(exact.values, differences(problem, u, base, 2.0**-9, 2), 1e-5, base)


def one_sided(problem: Problem, directions: Values, base: Values) -> list[tuple[Values, Values]]:
    """Derive to either side: [(derivatives, error bars) of steps forward, the same backward]."""
    size = max(size_of(problem.tensors[path]) for path in directions)
    eps = float(np.finfo(problem.dtype).eps)
    step, sides = size * eps**0.5, []
    for sign in (1, -1):
        near, far = (_moved(problem, directions, sign * k * step, base) for k in (1, 2))
        values, errors = {}, {}
        for path, y in base.items():
            with np.errstate(all="ignore"):
                once, twice = ((x[path] - y) * sign / step for x in (near, far))
                same = np.isinf(y) & (near[path] == y) & (far[path] == y)
                values[path] = np.where(same, 0.0, 2 * once - twice / 2)
                rounding = SAFETY * eps * abs(y) / step
                errors[path] = np.where(same, 0.0, abs(once - twice / 2) + rounding)
        sides.append((values, errors))
    return sides


def _moved(problem, directions, step, base):
    """Outputs with some tensors moved along their directions, shaped as `base`; NaN for none."""
    moved = dict(problem.tensors)
    for path, u in directions.items():
        moved[path] = (problem.tensors[path] + step * u).astype(problem.dtype)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            outputs = problem.outputs(problem.call(moved)[0])
        except Exception:  # outside of what the function is defined for
            outputs = {}
    return {path: outputs.get(path, np.full(y.shape, np.nan)) for path, y in base.items()}


def size_of(x: np.ndarray) -> float:
    """Return the size of the entries of a tensor, their root mean square; 1 where all are 0."""
    return float(np.sqrt(np.mean(np.square(x, dtype="float64")))) or 1.0 if x.size else 1.0


def _line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:60]
