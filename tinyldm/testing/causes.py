"""The likely cause of a wrong gradient, where it has a pattern that faults of a kind leave."""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tinyldm.testing.derivatives import derive, derive_entry, is_analytic
from tinyldm.testing.problem import Check

FACTORS = {0.5: "½", 0.25: "¼", -1.0: "−1 (its sign)"}
MOST_PLACES = 3  # at which a size is found, in a message


def likely_cause(
    check: Check, path: str, numeric: np.ndarray, ours: np.ndarray, close: np.ndarray
) -> str:
    """Name the likely cause of a wrong gradient, or return "" where no pattern is recognised."""
    context = _Context(check, path, numeric, ours, close)
    for recognise in OF_ONE if numeric.size == 1 else PATTERNS:
        if cause := recognise(context):
            return cause
    return ""


@dataclass
class _Context:
    check: Check
    path: str
    numeric: np.ndarray
    ours: np.ndarray
    close: np.ndarray

    def at_hand(self):
        """Finite arrays of the shape of the gradient: tensors, outputs, dy."""
        found = dict(self.check.problem.tensors) | self.check.base
        found |= {f"d{path}": w for path, w in self.check.dy.items()}
        for name, x in found.items():
            if x.shape == self.ours.shape and np.isfinite(x).all():
                yield name, x.astype("float64")

    def same(self, a, b):
        return a.shape == b.shape and bool((abs(a - b) <= self.close).all())


def _all_zero(c):
    if not c.ours.any() and c.numeric.any():
        return "it is zero everywhere: nothing is passed back, or it is not added to"
    if c.ours.any() and (abs(c.numeric) <= c.close).all():
        return "it should be zero everywhere: the result does not depend on it"
    return ""


def _sizes(c):
    """List what a mean may divide by: {number: where it is found}."""
    found, arrays = {}, c.check.problem.tensors | c.check.base
    for axis in range(max(x.ndim for x in arrays.values())):
        for path, x in arrays.items():
            if axis < x.ndim:
                found.setdefault(x.shape[axis], {}).setdefault(axis, []).append(path)
    places = {
        n: [
            f"the size of axis {axis} of {' and '.join(paths[:3])}" + " (the batch)" * (axis == 0)
            for axis, paths in axes.items()
        ]
        for n, axes in found.items()
    }
    for name, n in c.check.problem.integers().items():
        places.setdefault(n, []).append(f"the input {name}")
    for path, x in arrays.items():
        for count in range(2, x.ndim + 1):
            for axes in itertools.combinations(range(x.ndim), count):
                n, text = math.prod(x.shape[i] for i in axes), ", ".join(map(str, axes))
                places.setdefault(n, [f"the size of axes {text} of {path}"])
    return {n: where for n, where in places.items() if n > 1}


def _factor(numeric, ours, close):
    """Return k where ours = k · numeric in all entries, else None."""
    large = numeric.flat[int(abs(numeric).argmax())]
    if large == 0:
        return None
    k = ours.flat[int(abs(numeric).argmax())] / large
    if k == 0 or not np.isfinite(k):
        return None
    return float(k) if (abs(ours - k * numeric) <= np.maximum(1, abs(k)) * close).all() else None


def _multiplied(c):
    k = _factor(c.numeric, c.ours, c.close)
    if k is None:
        return ""
    return f"it is multiplied by {_named_factor(c, k)}"


def _named_factor(c, k):
    for n, places in _sizes(c).items():
        for value, text in ((n, f"{n}"), (1 / n, f"1/{n}")):
            if abs(k - value) <= 1e-4 * abs(value) and (n > 2 or "batch" in places[0]):
                kind = (
                    "a mean is missing, or a sum is taken twice"
                    if value > 1
                    else "a sum became a mean, or a mean is taken twice"
                )
                more = ", or …" * (len(places) > MOST_PLACES)
                return f"{text}, and {n} is {', or '.join(places[:MOST_PLACES])}{more}: {kind}"
    return _number(k)


def _number(k):
    for value, text in FACTORS.items():
        if abs(k - value) <= 1e-4 * abs(value):
            return text
    near = Fraction(k).limit_denominator(64)
    return str(near).replace("-", "−") if abs(k - near) <= 1e-6 * abs(k) else f"{k:.6g}"


def _of_one_entry(c):
    """A factor that is a simple one; any two numbers have some factor."""
    k = _factor(c.numeric, c.ours, c.close)
    if k is not None and _number(k) in ("2", *FACTORS.values()):
        return f"it is multiplied by {_number(k)}"
    return "a tensor of one entry tells no cause: try larger sizes"


def _of_another(c):
    for other, dx in c.check.grads.items():
        if other != c.path and c.same(dx.astype("float64"), c.numeric):
            return f"it is exchanged with that of {other}"
    for name, w in c.check.dy.items():
        if c.same(c.ours, w):
            return f"it is d{name} itself: the function's own derivative is missing"
        k = _factor(w, c.ours, c.close) if w.shape == c.ours.shape else None
        if k is not None:
            return f"it is d{name} times {_number(k)}: the function's own derivative is missing"
    return ""


def _jacobian(c):
    """Compare with what comes of parts of the Jacobian, or of the Jacobian not transposed."""
    path = c.path
    if list(c.check.dy) != ["y"] or c.check.dy["y"].shape != c.ours.shape or c.ours.size < 2:
        return ""
    w, problem, base = c.check.dy["y"], c.check.problem, c.check.base
    exact = is_analytic(problem, base, path)
    if c.same(c.ours, derive(problem, {path: w}, base, exact).values["y"]):
        return (
            "it is J dy, where Jᵀ dy is wanted: a matrix is not transposed, a kernel not flipped, "
            "or an angle not reversed"
        )
    diagonal = np.zeros(w.shape)
    for i in np.ndindex(w.shape):
        column = derive_entry(problem, path, i, base, exact)
        diagonal[i] = column.values["y"][i]
    if c.same(c.ours, w * diagonal):
        return "it has the diagonal of the Jacobian alone: each output depends on other inputs, too"
    return ""


def _taken_not_added(c):
    """Single values of dy, or of dy times an input, where they must be added up."""
    wrong = (abs(c.ours - c.numeric) > c.close) & (c.ours != 0)
    if not wrong.any():
        return ""
    near = float(np.max(c.close))
    for name, w in c.check.dy.items():
        kinds = {f"d{name}": w}
        for path, x in c.check.problem.tensors.items():
            if path != c.path and x.shape == w.shape:
                kinds[f"d{name} · {path}"] = w * x
        for text, values in kinds.items():
            if values.size <= c.ours.size and values.shape != c.ours.shape:
                continue
            apart = abs(c.ours[wrong][:, None] - values.reshape(1, -1)).min(1, initial=np.inf)
            if (apart <= near).all():
                return f"it holds single values of {text}: they must be added up, not assigned"
    return ""


def _masked(c):
    """Zero in some entries where it should not be, and not zero in others where it should be."""
    near = float(np.max(c.close))
    mine, theirs = abs(c.ours) > near, abs(c.numeric) > near
    if (mine & theirs).any() or not (mine.any() and theirs.any()):
        both = mine & theirs
        equal = (abs(c.ours - c.numeric) <= near)[both].all()
        if equal and (mine & ~theirs).any() and (theirs & ~mine).any():
            return "it is masked by another mask than that of the forward pass"
        return ""
    return "it is zero exactly where it should not be: the mask is inverted"


def _multiplied_by_entries(c):
    """Each entry is multiplied by, or divided by, a number at hand."""
    where = abs(c.numeric) > np.max(c.close)
    if where.sum() < 2 or ((abs(c.ours) > np.max(c.close)) & ~where).any():
        return ""
    ratio = np.where(where, c.ours, 1.0) / np.where(where, c.numeric, 1.0)
    wrong = where & (abs(c.ours - c.numeric) > c.close)
    for name, x in c.at_hand():
        for text, values in ((name, x), (f"|{name}|", abs(x))):
            for verb, k in (
                ("multiplied", values),
                ("divided", 1 / np.where(values == 0, 1, values)),
            ):
                if (abs(ratio - k)[wrong] <= 1e-5 * abs(k)[wrong]).all():
                    entries = "" if wrong.sum() == where.sum() else ", where it is wrong,"
                    return f"each entry{entries} is {verb} by {text} once too often"
    return ""


def _factor_of_slices(c):
    """Each slice along an axis has a factor of its own."""
    for axis in range(c.numeric.ndim):
        if _proportional(c.numeric, c.ours, axis, float(np.max(c.close))):
            return (
                f"it is multiplied by a number that is constant along axis {axis}: a division or "
                "product by a statistic of that axis"
            )
    return ""


def _one_of_a_slice(c):
    """One entry of each slice along an axis is wrong: that of an index."""
    wrong = abs(c.ours - c.numeric) > c.close
    for axis, n in enumerate(wrong.shape):
        if n > 2 and wrong.ndim > 1 and (wrong.sum(axis) == 1).all():
            return f"one entry of each slice along axis {axis} is wrong: that of an index or target"
    return ""


def _moved_entries(c):
    for axes in itertools.permutations(range(c.numeric.ndim)):
        if axes != tuple(range(c.numeric.ndim)) and c.same(c.ours, c.numeric.transpose(axes)):
            return f"it is transposed: axes {axes}"
    for count in range(1, c.numeric.ndim + 1):
        for axes in itertools.combinations(range(c.numeric.ndim), count):
            if c.same(c.ours, np.flip(c.numeric, axes)):
                return f"it is flipped along axis {', '.join(map(str, axes))}"
    for axis, n in enumerate(c.numeric.shape):
        for shift in (1, -1):
            inner = [slice(None)] * c.numeric.ndim
            inner[axis] = slice(1, None) if shift == 1 else slice(None, -1)
            moved = np.roll(c.numeric, shift, axis)
            there = tuple(inner)
            near = c.close[there] if c.close.ndim else c.close
            if n > 2 and (abs(c.ours[there] - moved[there]) <= near).all() and moved[there].any():
                return f"it is shifted by {shift:+d} along axis {axis}"
    if np.allclose(np.sort(c.ours, None), np.sort(c.numeric, None), atol=float(np.max(c.close))):
        return "its values are right, in another order: a wrong reshape or permutation"
    return ""


def _zero_slices(c):
    """Whole slices along an axis are zero, and the others right."""
    for axis in range(c.numeric.ndim):
        if c.numeric.shape[axis] < 2:
            continue
        slices = [np.take(c.numeric, i, axis) for i in range(c.numeric.shape[axis])]
        mine = [np.take(c.ours, i, axis) for i in range(c.numeric.shape[axis])]
        near = float(np.max(c.close))
        right = [bool((abs(a - b) <= near).all()) for a, b in zip(slices, mine, strict=True)]
        zero = [not b.any() and a.any() for a, b in zip(slices, mine, strict=True)]
        if any(zero) and all(r or z for r, z in zip(right, zero, strict=True)):
            where = [i for i, z in enumerate(zero) if z]
            return f"it is zero at {_some(where)} of axis {axis}, and should not be"
    return ""


def _some(numbers):
    text = ", ".join(map(str, numbers[:5]))
    return text + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def _part_zero(c):
    wrong = abs(c.ours - c.numeric) > c.close
    if wrong.any() and not c.ours[wrong].any():
        return f"it is zero in {int(wrong.sum())} entries where it should not be"
    if wrong.any() and (abs(c.numeric[wrong]) <= np.max(c.close)).all():
        return (
            f"it should be zero in {int(wrong.sum())} entries where it is not: a mask is forgotten"
        )
    return ""


def _only_borders(c):
    wrong = abs(c.ours - c.numeric) > c.close
    for axis, n in enumerate(wrong.shape):
        if n < 3:
            continue
        inner = np.take(wrong, range(1, n - 1), axis)
        if wrong.any() and not inner.any():
            ends = [i for i in (0, n - 1) if np.take(wrong, i, axis).any()]
            return f"only the borders of axis {axis} are wrong (index {_some(ends)}): padding"
    return ""


def _missing_term(c):
    """The residual is constant along axes, or proportional to something at hand, along them."""
    residual = c.numeric - c.ours
    near = float(np.max(c.close))
    for axis in range(residual.ndim):
        if residual.shape[axis] > 1 and np.ptp(residual, axis).max() <= near:
            return (
                f"a term is missing or has a wrong factor: it is constant along axis {axis}, as "
                "that of a mean or a sum over it"
            )
    for name, x in c.at_hand():
        k = _factor(x, residual, c.close)
        if k is not None:
            times = "" if _number(k) == "1" else f" times {_number(k)}"
            return f"a term is missing or has a wrong factor: {name}{times}"
        for axis in range(x.ndim):
            if _proportional(x, residual, axis, near):
                return (
                    f"a term is missing or has a wrong factor: {name} times a number for each "
                    f"slice along axis {axis}"
                )
    for name, x in c.at_hand():
        for axis in range(x.ndim):
            if x.shape[axis] > 3 and _proportional(
                x - x.mean(axis, keepdims=True),
                residual - residual.mean(axis, keepdims=True),
                axis,
                near,
            ):
                return (
                    f"two terms along axis {axis} are missing, one constant and one of {name}: as "
                    "if its mean and deviation were constants"
                )
    return ""


def _proportional(x, residual, axis, near):
    """Return whether residual = k · x with a k that is constant along the axis."""
    if x.shape[axis] < 2:
        return False
    squares = (x * x).sum(axis, keepdims=True)
    k = (x * residual).sum(axis, keepdims=True) / np.where(squares == 0, 1, squares)
    return bool((abs(residual - k * x) <= near).all())


OF_ONE = (_all_zero, _of_one_entry)
PATTERNS = (  # in the order in which they are tried
    _all_zero, _multiplied, _of_another, _moved_entries, _masked, _taken_not_added, _jacobian,
    _zero_slices, _part_zero, _only_borders, _multiplied_by_entries, _one_of_a_slice,
    _missing_term, _factor_of_slices,
)  # fmt: skip
