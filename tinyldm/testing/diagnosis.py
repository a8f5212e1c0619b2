"""The message of a wrong gradient: which entries, by how much, and the likely cause."""

import time
from dataclasses import dataclass

import numpy as np

from tinyldm.testing.causes import likely_cause
from tinyldm.testing.derivatives import Derivative, derive_entry
from tinyldm.testing.problem import Check

MOST_NAMED = 5  # tensors
MOST_ENTRIES = 4096  # of a tensor whose whole numeric gradient is made
MOST_SECONDS = 5.0  # of processor time for that, of all wrong tensors together
CLOSE = 1e-6  # relative: entries are equal; of float32 or of differences: ROUGHLY
ROUGHLY = 1e-3
UNKNOWN = "  no pattern is known: where {} is used more than once, are all its parts added up?"


@dataclass
class Fault:
    """A gradient that is wrong, or of which it cannot be told, along one direction."""

    path: str
    numeric: float
    ours: float
    error: float
    mismatch: float
    derivative: Derivative
    tol: float
    undecided: bool = False
    reason: str = ""


def report(check: Check, faults: list[Fault]) -> str:
    """Write the message of a check: for each fault what was found, in lines of 80 columns."""
    lines, until = [], time.process_time() + MOST_SECONDS
    for fault in faults[:MOST_NAMED]:
        if fault.undecided:
            lines += [f"{fault.path}: cannot tell whether its gradient is right", *_along(fault)]
            lines.append(f"  why: {fault.reason}")
            continue
        lines += [f"{fault.path}: wrong gradient", *_along(fault)]
        found = _entries(check, fault, until)
        if found is None:
            size = check.grads[fault.path].size
            lines.append(f"  its {size:,} entries were not compared one by one: too many, or slow")
            continue
        lines += _worst(fault.path, *found)
        cause = likely_cause(check, fault.path, *found) or fault.reason
        lines.append(f"  likely cause: {cause}" if cause else UNKNOWN.format(fault.path))
    others = [fault.path for fault in faults[MOST_NAMED:]]
    if others:
        more = ", …" if len(others) > MOST_NAMED else ""
        lines.append(f"and {len(others)} more: {', '.join(others[:MOST_NAMED])}{more}")
    right = [path for path in check.problem.tensors if path not in {f.path for f in faults}]
    if right and not faults[0].undecided:
        more = f" and {len(right) - MOST_NAMED} more" if len(right) > MOST_NAMED else ""
        lines.append(f"right: {', '.join(right[:MOST_NAMED])}{more}")
    return "\n".join(lines)


def _along(fault):
    bar = f" ± {fault.error:.1g}" if fault.error else ""
    method = "complex step" if fault.derivative.exact else "differences"
    return [
        f"  along a random direction ({method}):",
        f"    forward pass {fault.numeric:.12g}{bar}, backward pass {fault.ours:.12g}",
        f"  apart by {fault.mismatch:.1e} of the sum of all sizes, accepted are {fault.tol:.0e}",
    ]


def _worst(path, numeric, ours, close):
    apart = abs(ours - numeric)
    wrong = apart > close
    at = np.unravel_index(int(apart.argmax()), apart.shape)
    where = f"{path}[{', '.join(str(int(i)) for i in at)}]" if apart.ndim else path
    times = ours[at] / numeric[at] if numeric[at] else np.inf
    return [
        f"  wrong: {int(wrong.sum()):,} of {wrong.size:,} entries; the worst is {where}:",
        f"    forward pass {numeric[at]:.10g}, backward pass {ours[at]:.10g}"
        + (f" (×{times:.6g})" if np.isfinite(times) else ""),
    ]


def _entries(check, fault, until):
    """Make the whole numeric gradient of a tensor → (it, ours, how far apart is close), or None."""
    problem, path = check.problem, fault.path
    x = problem.tensors[path]
    if x.size > MOST_ENTRIES:
        return None
    numeric, errors = np.zeros(x.shape), np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        if time.process_time() > until:
            return None
        derivative = derive_entry(problem, path, i, check.base, fault.derivative.exact)
        numeric[i], errors[i], _ = derivative.along(check.dy)
    share = CLOSE if fault.derivative.exact else ROUGHLY
    ours = check.grads[path].astype("float64")
    errors = np.where(np.isfinite(errors), errors, 0.0)
    return numeric, ours, share * max(abs(numeric).max(), abs(ours).max()) + errors
