"""The gradient heat map: how far off every gradient is, by each of several instruments.

`python -m tests.heat_map [FILE]` prints the table, and draws it into an image FILE (which needs
matplotlib).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "support"))

import gradients  # noqa: E402
from backward_checks import CHECKS, MODULES, SMALL, plant  # noqa: E402

from tinyldm.kernels import blocking, plain  # noqa: E402
from tinyldm.testing import (  # noqa: E402
    Undecided,
    check_gradients,
    check_jacobian,
    check_second_order,
    check_taylor,
)
from tinyldm.testing.problem import Problem  # noqa: E402

MOST_ENTRIES = 250  # numbers in inputs and parameters together, for a whole Jacobian


@dataclass(frozen=True)
class Case:
    """One call that a gradient check makes, with the options that the check has."""

    f: Callable
    inputs: list
    params: dict | None
    options: dict

    @property
    def arguments(self):
        """Return what every instrument takes."""
        return self.f, self.inputs, self.params


def cases(module: str, check: str) -> list[Case]:
    """List the calls of a check of backward_checks.py, of the module as it is."""
    found = []

    def record(f, inputs, params=None, **options):
        found.append(Case(f, inputs, params, options))
        return {"": 0.0}

    kept, gradients.check_gradients = gradients.check_gradients, record
    try:
        CHECKS[check](plant(module))
    finally:
        gradients.check_gradients = kept
    return found


# ------------------------------------------------------------------------------- the instruments
#
# Each takes a case and returns how far off it is, or None where it cannot be used.


def is_derivative(case):
    """Gradients that are stopped or passed straight through are no derivatives."""
    return case.options.get("method") != "complex"


def complex_step(case):
    """The worst mismatch of `check_gradients`, by the complex step alone."""
    return max(check_gradients(*case.arguments, method="complex").values())


def differences(case):
    """Return the worst mismatch by central differences; a zero that they cannot tell gives None."""
    try:
        found = check_gradients(*case.arguments, method="central") if is_derivative(case) else {}
    except Undecided:
        return None
    return max(found.values(), default=None)


def jacobian(case):
    """The worst entry of the Jacobian."""
    numbers = sum(x.size for x in Problem(*case.arguments, None).tensors.values())
    small = numbers <= MOST_ENTRIES and is_derivative(case)
    return check_jacobian(*case.arguments) if small else None


def hessian(case):
    """Measure how far the Hessian that the backward pass implies is from a symmetric one."""
    return check_second_order(*case.arguments) if is_derivative(case) else None


def taylor(case):
    """Measure how far the slope of Taylor's remainder is below 2."""
    return max(0.0, 2 - check_taylor(*case.arguments)) if is_derivative(case) else None


def single(case):
    """The gradients in float32 against those in float64, relative to the largest entry of each."""
    exact, rounded = (_gradients(case, dtype) for dtype in ("float64", "float32"))
    worst = max(abs(dx).max(initial=0.0) for dx in exact.values())
    return max(
        abs(rounded[path] - dx).max(initial=0.0) / max(abs(dx).max(initial=0.0), 1e-3 * worst)
        for path, dx in exact.items()
    )


def _gradients(case, dtype):
    problem, rng = Problem(*case.arguments, None, dtype), np.random.default_rng(0)
    y, backward = problem.call(problem.tensors)
    dy = {path: rng.normal(size=out.shape) for path, out in problem.outputs(y).items()}
    return backward(problem.derivatives_of(y, dy), {})


INSTRUMENTS = {  # → what it may be at most
    "complex step": (complex_step, 1e-11),
    "central differences": (differences, 1e-7),
    "Jacobian": (jacobian, 1e-9),
    "Hessian": (hessian, 1e-9),
    "Taylor": (taylor, 0.1),
    "float32": (single, 1e-4),
}
ROWS = [  # but for parts of a U-Net, which are in that of the whole, and kernels of float32 alone
    (module, check)
    for module, checks in MODULES.items()
    for check in checks
    if module != "tinyldm.models.levels" and ".cuda." not in module
]


def row(module: str, check: str) -> dict[str, float | None]:
    """Measure one check by all instruments → {instrument: the worst of its calls}."""
    kept, blocking.BLOCK = blocking.BLOCK, SMALL
    try:
        with plain():
            calls = cases(module, check)
            found = {
                name: [measure(case) for case in calls]
                for name, (measure, _) in INSTRUMENTS.items()
            }
    finally:
        blocking.BLOCK = kept
    return {
        name: max((x for x in each if x is not None), default=None) for name, each in found.items()
    }


def main() -> None:
    """Print the table, and draw it where a file is given."""
    table = {}
    print(f"{'':44}" + "".join(f"{name:>21}" for name in INSTRUMENTS))
    for module, check in ROWS:
        label = f"{module.removeprefix('tinyldm.')}: {check}"
        table[label] = row(module, check)
        cells = ["–" if x is None else f"{x:.0e}" for x in table[label].values()]
        print(f"{label:44}" + "".join(f"{cell:>21}" for cell in cells), flush=True)
    if len(sys.argv) > 1:
        draw(table, sys.argv[1])


def draw(table: dict[str, dict[str, float | None]], file: str) -> None:
    """Draw the table in two halves: the colour says how far below its limit an error is."""
    import matplotlib.pyplot as plt

    labels, half = list(table), -(-len(table) // 2)
    most = np.array([limit for _, limit in INSTRUMENTS.values()])
    titles = [
        f"{name.replace(' ', chr(10))}\n≤ {limit:g}" for name, (_, limit) in INSTRUMENTS.items()
    ]
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.24 * half + 1.6), layout="constrained")
    for axis, some in zip(axes, (labels[:half], labels[half:]), strict=True):
        errors = np.array(
            [[np.nan if x is None else x for x in table[label].values()] for label in some]
        )
        below = np.log10(np.maximum(errors, 1e-17) / most)
        image = axis.imshow(below, vmin=-8, vmax=0, cmap="YlOrBr", aspect="auto")
        axis.set_xticks(range(len(titles)), titles, fontsize=8)
        axis.xaxis.tick_top()
        axis.set_yticks(range(len(some)), some, fontsize=9)
        axis.tick_params(length=0)
        for (i, j), error in np.ndenumerate(errors):
            text = "–" if np.isnan(error) else "0" if error < 1e-17 else f"{error:.0e}"
            axis.text(j, i, text.replace("e-0", "e-"), ha="center", va="center", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=40, location="bottom")
    bar.set_label("power of ten by which the largest error lies below its limit")
    figure.savefig(file, dpi=100)
    Image.open(file).quantize(64).save(file, optimize=True)


if __name__ == "__main__":
    main()
