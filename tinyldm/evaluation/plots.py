"""Plots: curves with axes and labels, drawn by matplotlib where it is installed."""

import html
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from tinyldm.files import replacing

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8860b", "#a3478a", "#3f9bd1", "#7d7d7d", "#7a5c00")
DASHES = ("-", "--", "-.", ":")  # so that colour alone tells nothing
FEW = 12  # points, of which each is shown
INK = "#010203"  # of text and axes; a page replaces it by its own
STYLE = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "svg.fonttype": "none", "svg.hashsalt": "tinyldm",
}  # fmt: skip


class Curves(NamedTuple):
    """Curves of a plot: {name: (x, y)} with its title and the names of its axes.

    logarithmic: the vertical axis, which then leaves out what has no logarithm. marks: values of x
    with a vertical line, each with what to call it.
    """

    series: dict[str, tuple[Sequence[float], Sequence[float]]]
    title: str
    x: str
    y: str
    logarithmic: bool = True
    marks: Sequence[tuple[float, str]] = ()


class PlotsLeftOut(UserWarning):
    """matplotlib, which draws curves, is not installed."""


def save_plot(file: Path, curves: Curves) -> None:
    """Write a plot as PNG, whole or not at all; nothing where matplotlib is not installed."""
    content = _render(curves, format="png", dpi=110, metadata={"Software": None})
    if content:
        with replacing(file) as temporary:
            Path(temporary).write_bytes(content)


def svg_of(curves: Curves) -> str:
    """Return a plot as an SVG element in the colour of the text around it; "" without matplotlib.

    Its texts are text, so that they can be found and read aloud.
    """
    content = _render(curves, format="svg", transparent=True, metadata={"Date": None}).decode()
    ends = (
        f"{name} from {y[0]:.3g} at {x[0]:g} to {y[-1]:.3g} at {x[-1]:g}"
        for name, (x, y) in curves.series.items()
        if len(x)
    )
    told = f"{curves.title}. {curves.y} against {curves.x}: {'; '.join(ends)}"
    told = "; ".join([told, *(text for _, text in curves.marks)])
    svg = content[content.find("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(told)}"', 1)


def _render(curves, **options):
    """Draw and encode curves; b"", with a warning, where matplotlib is not installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn(
            "matplotlib is not installed, so plots of curves are left out; to have them: "
            "pip install matplotlib",
            PlotsLeftOut, stacklevel=1,
        )  # fmt: skip
        return b""
    content = BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6))
        figure.subplots_adjust(left=0.12, right=0.97, bottom=0.14, top=0.9)
        _draw(figure.subplots(), curves)
        figure.savefig(content, **options)
    return content.getvalue()


def _draw(axes, curves):
    for i, (name, (x, y)) in enumerate(curves.series.items()):
        points = [(a, b) for a, b in zip(x, y, strict=True) if b > 0 or not curves.logarithmic]
        axes.plot(
            [a for a, _ in points], [b for _, b in points], label=name,
            color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i // 2 % len(DASHES)],
            marker="o" if len(points) < FEW else None, markersize=4,
        )  # fmt: skip
    axes.set(title=curves.title, xlabel=curves.x, ylabel=curves.y)
    if curves.logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    for at, text in curves.marks:
        axes.axvline(at, color=INK, linewidth=0.8, linestyle=":")
        place = axes.get_xaxis_transform()  # the height as a share of the axis
        axes.annotate(text, (at, 1), (4, -4), place, "offset points", va="top")
    if len(curves.series) > 1:
        axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
