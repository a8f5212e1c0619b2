"""Guidance scale: how strongly should the caption be followed? (Ho & Salimans 2022)

The same captions are sampled from the same noise at rising guidance, the highest also with
guidance rescale (Lin et al. 2023, section 3.4). Accuracy is the share of captions whose image
is right, by rule. Its cost is measured against real images of these very captions: the Fréchet
distance, precision (fidelity) and recall (diversity), and the share of saturated pixels, with a
channel at 0 or 255.
"""

from pathlib import Path

import numpy as np

from tinyldm.data.shapes import Attributes, draw, make_shapes
from tinyldm.evaluation.metrics import SEED, latent_features
from tinyldm.evaluation.plots import Curves, save_plot
from tinyldm.evaluation.scenes import generate
from tinyldm.evaluation.statistics import frechet_distance, precision_recall
from tinyldm.experiments.scoring import Report, accuracy
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.preparation import Say
from tinyldm.training.signals import Interruptible

GUIDANCE = (1, 1.5, 2, 3, 4, 6, 8)
RESCALED, RESCALE = (4, 6, 8), 0.7  # the guidance scales with rescale, and its strength
CAPTIONS = 500
SHOWN = 9  # in a row of the sheet
COLUMNS = {
    "name": ("guidance", ""),
    "accuracy_all": ("captions right", ".1%"),
    "frechet": ("Fréchet distance", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "saturated": ("saturated pixels", ".2%"),
}


def run(folder: Path, out: Path, say: Say, count: int = CAPTIONS) -> list[dict]:
    """Try guidance scales on a run; writes results.json, table.md, guidance.png and samples.png."""
    pipeline = Pipeline.load(folder)
    side = pipeline.size[0]
    truth, captions = make_shapes(count, side, SEED)
    features = latent_features(pipeline, truth)

    def scores(images):
        made = latent_features(pipeline, images)
        precision, recall = precision_recall(made, features)
        return {
            "accuracy_all": accuracy(images, captions),
            "frechet": frechet_distance(made, features),
            "precision": precision,
            "recall": recall,
            "saturated": float(np.isin(images, (0, 255)).any(axis=-1).mean()),
        }

    trials = [(guidance, 0.0) for guidance in GUIDANCE]
    trials += [(guidance, RESCALE) for guidance in RESCALED]
    sheet, names = [], []
    with Interruptible() as stop:
        report = Report(out, COLUMNS, stop)
        # The best that any denoiser can reach: other real images, through the first stage.
        others = pipeline.decode(pipeline.encode(drawn_again(captions, side)))
        report.add({"name": "true images", "guidance": None, "rescale": None} | scores(others))
        for guidance, rescale in trials:
            name = f"{guidance:g}" + (f", rescale {rescale:g}" if rescale else "")
            images = generate(pipeline, captions, guidance=guidance, rescale=rescale, seed=SEED)
            row = {"name": name, "guidance": guidance, "rescale": rescale} | scores(images)
            report.add(row)
            say(f"guidance {name}: {row['accuracy_all']:.1%} of the captions are right")
            sheet.append(images[:SHOWN])
            names.append(name.replace(", ", "\n"))
    report.save_samples(sheet, names, captions)
    title = "how far from real images"
    curves = Curves(lines(report.rows), title, "guidance scale", "Fréchet distance", False)
    save_plot(out / "guidance.png", curves)
    return report.rows


def drawn_again(captions: list[str], side: int) -> np.ndarray:
    """Draw real images of these captions, with other geometry, uint8 (n, side, side, 3)."""
    rngs = [np.random.default_rng((SEED + 1, i)) for i in range(len(captions))]
    pairs = zip(captions, rngs, strict=True)
    return np.stack([draw(Attributes.parse(caption), rng, side) for caption, rng in pairs])


def lines(rows: list[dict]) -> dict[str, tuple]:
    """Return the curves: Fréchet distance against guidance, and that of real images."""

    def of(chosen):
        return [row["guidance"] for row in chosen], [row["frechet"] for row in chosen]

    true, *generated = rows
    plain = [row for row in generated if row["rescale"] == 0]
    ends = [plain[0]["guidance"], plain[-1]["guidance"]]
    return {
        "generated": of(plain),
        "rescaled": of([row for row in generated if row["rescale"]]),
        "true images": (ends, [true["frechet"]] * 2),
    }
