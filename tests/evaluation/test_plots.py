"""Plots: where the lines are, what is written beside them, and what is left without matplotlib."""

import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from tinyldm.evaluation import plots
from tinyldm.evaluation.plots import Curves, PlotsLeftOut, save_plot, svg_of


def drawn(monkeypatch, curves):
    """The axes that matplotlib was given."""
    kept, draw = [], plots._draw
    monkeypatch.setattr(plots, "_draw", lambda axes, what: (draw(axes, what), kept.append(axes)))
    svg_of(curves)
    return kept[0]


SERIES = {"a": ([0, 50, 100], [100.0, 10.0, 1.0]), "b": ([0, 100], np.array([10.0, 20.0]))}


@pytest.mark.parametrize("logarithmic", [True, False])
def test_lines_go_through_their_numbers(monkeypatch, logarithmic):
    axes = drawn(monkeypatch, Curves(SERIES, "a title", "steps", "loss", logarithmic))
    found = {line.get_label(): line.get_xydata().T.tolist() for line in axes.get_lines()}
    assert found == {name: [list(x), list(y)] for name, (x, y) in SERIES.items()}
    texts = axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()
    assert texts == ("a title", "steps", "loss", "log" if logarithmic else "linear")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    colours = [line.get_color() for line in axes.get_lines()]
    assert len(set(colours)) == 2 and plots.INK not in colours


def test_an_axis_that_is_not_logarithmic_shows_zero(monkeypatch):
    axes = drawn(monkeypatch, Curves({"a": ([1, 2], [5.0, 6.0])}, "t", "x", "y", logarithmic=False))
    assert axes.get_ylim()[0] == 0
    assert axes.get_legend() is None  # there is one line, and a title


def test_values_that_have_no_logarithm_are_left_out(monkeypatch):
    axes = drawn(monkeypatch, Curves({"a": ([0, 1, 2, 3], [1.0, 0.0, -1.0, 10.0])}, "t", "x", "y"))
    assert axes.get_lines()[0].get_xydata().tolist() == [[0, 1], [3, 10]]


def test_marks_stand_where_they_are_meant(monkeypatch):
    axes = drawn(monkeypatch, Curves(SERIES, "t", "x", "y", marks=[(30, "half")]))
    assert [text.get_text() for text in axes.texts] == ["half"]
    assert axes.get_lines()[-1].get_xdata() == [30, 30]


@pytest.mark.parametrize(
    "series",
    [
        {"one": ([1], [0.5])},
        {"flat": ([1, 2, 3], [0.5, 0.5, 0.5])},
        {"wild": ([1, 2, 3], [1e-30, 1e30, 1.0])},
        {"nothing": ([1, 2], [0.0, 0.0])},
        {"none": ([], [])},
        {str(i): ([1, 2], [0.1 + i, 0.2]) for i in range(20)},
    ],
    ids=lambda series: next(iter(series)) + str(len(series)),
)
@pytest.mark.parametrize("logarithmic", [True, False])
def test_any_numbers_can_be_drawn(series, logarithmic, tmp_path):
    save_plot(tmp_path / "a.png", Curves(series, "Überschrift", "x", "y", logarithmic))
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(image.convert("L")).min() < 128


def test_a_plot_is_the_same_each_time_and_in_the_colour_of_its_page(tmp_path):
    curves = Curves(SERIES, "a title", "steps", "loss")
    svg = svg_of(curves)
    assert svg == svg_of(curves)
    root = ET.fromstring(svg)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a title", "steps", "loss", "a", "b"} <= set(words)
    assert "currentColor" in svg and plots.INK not in svg
    for name in ("a.png", "b.png"):
        save_plot(tmp_path / name, curves)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_matplotlib_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(PlotsLeftOut, match="pip install matplotlib") as caught:
        save_plot(tmp_path / "a.png", Curves(SERIES, "t", "x", "y"))
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(PlotsLeftOut):
        assert svg_of(Curves(SERIES, "t", "x", "y")) == ""
