"""Samplers: how many steps does each of them need?

Every sampler generates images of the same captions from the same noise, in few steps and in many.
The cost of a step differs, so network calls are counted: U-Net evaluations per image, two a
prediction with guidance. Samplers that draw no noise on the way all solve one differential
equation: their error is the distance from the result of DDIM in 200 steps. A little of it stays,
because their first and last time steps differ, as in diffusers.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tinyldm.backend import Array
from tinyldm.config import ConfigError
from tinyldm.data.shapes import make_shapes
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.evaluation.metrics import SEED
from tinyldm.evaluation.plots import Curves, save_plot
from tinyldm.evaluation.scenes import generate
from tinyldm.experiments.scoring import Report, accuracy
from tinyldm.sampling.pipeline import SAMPLES_AT_ONCE, Pipeline
from tinyldm.training.preparation import Say
from tinyldm.training.signals import Interruptible

STEPS = (3, 5, 10, 25, 50)
REFERENCE = 200  # steps of DDIM
FROM_REFERENCE = f"mean difference from {REFERENCE} steps of ddim, of 255"
CAPTIONS = 200
COLUMNS = {
    "sampler": ("sampler", ""),
    "steps": ("steps", "d"),
    "network_calls": ("network calls per image", "g"),
    "seconds": ("seconds per image", ".3g"),
    "accuracy_all": ("captions right", ".1%"),
    "distance": ("distance, levels of 255", ".2f"),
}


class Counting(Pipeline):
    """A pipeline that counts the samples that its U-Net evaluates."""

    seen = 0

    @contextlib.contextmanager
    def predictor(
        self, context: Array, at_once: int = SAMPLES_AT_ONCE
    ) -> Iterator[Callable[[Array, int], Array]]:
        with super().predictor(context, at_once) as predict:

            def counted(x, t):
                self.seen += len(x)
                return predict(x, t)

            yield counted


def run(folder: Path, out: Path, say: Say, count: int = CAPTIONS) -> list[dict]:
    """Try samplers and steps on a run; writes results.json, table.md, plots and samples.png."""
    pipeline = Counting.load(folder)
    _, captions = make_shapes(count, pipeline.size[0], SEED)

    def generated(sampler, steps):
        return generate(pipeline, captions, sampler=sampler, steps=steps, seed=SEED)

    say(f"{count} captions, first by ddim in {REFERENCE} steps")
    reference = generated("ddim", REFERENCE)
    sheet, shown = [], []
    with Interruptible() as stop:
        report = Report(out, COLUMNS, stop)
        for sampler in SAMPLERS:
            first = []
            try:
                generated(sampler, STEPS[0])
            except ConfigError as error:  # it does not know the schedule of this run
                say(f"{sampler}: left out, {error}")
                continue
            for steps in STEPS:
                before, started = pipeline.seen, time.monotonic()
                images = generated(sampler, steps)
                seconds = time.monotonic() - started
                error = np.abs(np.subtract(images, reference, dtype=np.float32)).mean()
                row = {
                    "sampler": sampler,
                    "steps": steps,
                    "network_calls": (pipeline.seen - before) / len(captions),
                    "seconds": seconds / len(captions),
                    "accuracy_all": accuracy(images, captions),
                    "distance": None if SAMPLERS[sampler].needs_noise else float(error),
                }
                report.add(row)
                first.append(images[0])
            sheet.append(first)
            shown.append(sampler)
            say(f"{sampler}: {row['accuracy_all']:.1%} right in {steps} steps")
    titles = [f"{steps} steps" for steps in STEPS]
    report.save_samples(sheet, shown, captions[:1] * len(STEPS), titles)
    for key, y in (("accuracy_all", "share of captions right"), ("distance", FROM_REFERENCE)):
        curves = Curves(
            lines(report.rows, key), "eight samplers", "network calls per image", y,
            logarithmic=key == "distance",
        )  # fmt: skip
        save_plot(out / f"{key.partition('_')[0]}.png", curves)
    return report.rows


def lines(rows: list[dict], key: str) -> dict[str, tuple]:
    """Return {sampler: (network calls, values)} of the samplers that have a value."""
    found = {}
    for sampler in SAMPLERS:
        points = [row for row in rows if row["sampler"] == sampler and row[key] is not None]
        if points:
            found[sampler] = tuple([row[name] for row in points] for name in ("network_calls", key))
    return found
