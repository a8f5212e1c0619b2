"""The accuracy of generated images, and the report of an experiment: its table and its images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyldm.evaluation.figures import grid, save_image
from tinyldm.evaluation.reader import score
from tinyldm.files import replacing, write_json
from tinyldm.training.signals import Interruptible, Stopped


def accuracy(images: np.ndarray, captions: Sequence[str]) -> float:
    """Compute the share of captions whose five attributes are all right in the image, by rule."""
    return score(images, captions)["all"]


class Report:
    """Report of an experiment: results.json and table.md, both of them whole after every row.

    columns: {key of a row: (title, how to format it)} of the table; None is shown as a dash.
    """

    def __init__(self, out: Path, columns: dict[str, tuple[str, str]], stop: Interruptible):
        self.out, self.columns, self.stop = out, columns, stop
        self.rows = []

    def add(self, row: dict) -> None:
        """Add a row and write both files. Raises Stopped once it is written, after a signal."""
        self.rows.append(row)
        write_json(self.out / "results.json", self.rows)
        lines = [[title for title, _ in self.columns.values()], ["---"] * len(self.columns)]
        lines += [[self._cell(one, key) for key in self.columns] for one in self.rows]
        with replacing(self.out / "table.md") as temporary:
            text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
            temporary.write_text(text, encoding="utf-8")
        if self.stop.number:
            raise Stopped(self.stop.number)

    def save_samples(
        self,
        images: Sequence[np.ndarray],
        labels: Sequence[str],
        captions: Sequence[str],
        titles: Sequence[str] | None = None,
    ) -> None:
        """Save samples.png: a row of images, uint8 (n, h, w, 3), for each label.

        captions: of the n columns, below the last row. titles: above them.
        """
        n = len(images[0])
        below = [""] * n * (len(images) - 1) + list(captions[:n])
        sheet = grid(np.concatenate(images), below, columns=n, labels=labels, titles=titles)
        save_image(self.out / "samples.png", sheet)

    def _cell(self, row, key):
        return "–" if row[key] is None else format(row[key], self.columns[key][1])
