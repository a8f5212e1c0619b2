"""The subject of a report, a trained run, and the contents that its chapters put on the page."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm.data.dataset import Dataset
from tinyldm.data.shapes import COLOURS
from tinyldm.evaluation.plots import Curves, svg_of
from tinyldm.sampling.pipeline import Pipeline

NAMED = COLOURS | {"grey": (128, 128, 128)}
LEAST = 0.05  # share of an image, below which its colour is not named
LARGEST = 64  # pixels of a side of an image on the page


@dataclass
class Subject:
    """A trained run, and some captions to show it with."""

    run: Path
    pipeline: Pipeline
    training: Dataset
    held_out: Dataset
    prompts: list[str]  # different ones, at least one

    @property
    def is_conditional(self) -> bool:
        """Return whether there is more than one caption or class."""
        return len(set(self.training.captions)) > 1


@dataclass
class Contents:
    """Contents of the page, for JSON: sheets of images, lists of texts or facts, plots as SVG."""

    sheets: dict[str, dict] = field(default_factory=dict)
    texts: dict[str, list] = field(default_factory=dict)
    plots: dict[str, str] = field(default_factory=dict)

    def sheet(self, name: str, images: np.ndarray, said: list[str] | None = None) -> None:
        """Add images, uint8 (rows, columns, h, w, 3), as one file, each at most 64 pixels large.

        said: what is to be seen in each, for those who do not see it; by default its colours.
        """
        rows, columns, h, w, _ = images.shape
        said = said or [colours_of(image) for image in images.reshape(-1, h, w, 3)]
        words = {text: i for i, text in enumerate(dict.fromkeys(said))}  # each stands there once
        count = rows * columns
        across = math.ceil(math.sqrt(count * h / w))  # a square: WebP has an end
        down = -(-count // across)
        tiles = np.zeros((down * across, h, w, 3), np.uint8)
        tiles[:count] = images.reshape(count, h, w, 3)
        tiles = tiles.reshape(down, across, h, w, 3).swapaxes(1, 2)
        image = Image.fromarray(tiles.reshape(down * h, across * w, 3))
        if max(h, w) > LARGEST:
            h, w = (max(1, side * LARGEST // max(h, w)) for side in (h, w))
            image = image.resize((across * w, down * h), Image.Resampling.BOX)
        self.sheets[name] = {
            "src": data_uri(image), "across": across, "down": down, "h": h, "w": w,
            "rows": rows, "columns": columns,
            "words": list(words), "said": [words[text] for text in said],
        }  # fmt: skip

    def text(self, name: str, texts: Sequence[str]) -> None:
        """Add a list of texts: the choices of a control, or what it says at each of its values."""
        self.texts[name] = list(texts)

    def plot(self, name: str, curves: Curves) -> None:
        """Add a plot, or "" where matplotlib is not installed, which the page then says."""
        self.plots[name] = svg_of(curves)


def colours_of(image: np.ndarray) -> str:
    """Name the colours that most of an image, uint8 (h, w, 3), is nearest to, with their shares."""
    names, table = list(NAMED), np.array(list(NAMED.values()), float)
    distance = np.square(image.reshape(-1, 1, 3) - table).sum(axis=2)
    shares = np.bincount(distance.argmin(axis=1), minlength=len(names)) / distance.shape[0]
    most = [i for i in np.argsort(-shares, kind="stable")[:3] if shares[i] >= LEAST]
    return ", ".join(f"{names[i]} {shares[i]:.0%}" for i in most)


def data_uri(image: Image.Image, **options: object) -> str:
    """Encode an image as WebP in a data URI, without loss unless the options say otherwise."""
    content = BytesIO()
    image.save(content, format="WEBP", **{"lossless": True, "quality": 80, "method": 4} | options)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
