"""`tinyldm eval`: score a run on its own data."""

import json
import warnings
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyldm.cli.arguments import add_device, add_options, chosen, say
from tinyldm.data.dataset import DataError, Dataset
from tinyldm.data.tokenizer import CaptionCut
from tinyldm.evaluation.figures import grid, save_image
from tinyldm.evaluation.metrics import SEED, evaluate
from tinyldm.evaluation.table import table
from tinyldm.files import replacing
from tinyldm.options import option
from tinyldm.sampling.params import SamplingParams
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.classifier import SECONDS, classifier_of
from tinyldm.training.preparation import load_data, prompts_of, split
from tinyldm.training.run import whole_run
from tinyldm.training.state import load_notes

TRUSTED = 0.5  # least share of held-out images that a classifier is right on, to be used


@dataclass(frozen=True)
class Scoring:
    """Options of scoring."""

    captions: int = option("number of images to generate", 500, least=4, most=100_000, metavar="N")
    seed: int = option(
        "seed of captions, noise, and which images are looked at", 0, least=0, most=2**31
    )
    classifier_seconds: float = option(
        "seconds to train the classifier whose features compare images; 0 to compare latents",
        SECONDS, least=0, most=100_000, metavar="S",
    )  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Add the run to score, and the options of scoring."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of the run")
    add_moved_data(parser)
    add_options(parser, Scoring)
    add_options(parser, SamplingParams, ("steps", "guidance"))
    add_device(parser)


def add_moved_data(parser: ArgumentParser) -> None:
    """Add --data, for images that have moved."""
    text = "folder of the run's images, if they have moved"
    parser.add_argument("--data", metavar="FOLDER", help=text)


def data_of(run: Path, moved: str | None) -> tuple[dict, Dataset, Dataset]:
    """Load the images of a run: its notes, the images that it was trained on, and the held-out.

    moved: the folder where they are now. Raises DataError where they are no longer the same.
    """
    notes = load_notes(run)
    config = notes["config"] = replace(notes["config"], data=moved or notes["config"].data)
    data = load_data(config)
    if data.fingerprint() != notes["data"]:  # the held-out split is no longer known
        raise DataError(
            f"{config.data}: the {len(data):,} images and captions are no longer those that "
            f"{run} was trained on; bring them back, or name their folder with --data"
        )
    return notes, *split(data, config)


def run(options: Namespace) -> None:
    """Score a run on its own data: a table, eval.json and samples/nearest.png."""
    run = Path(whole_run(options.run_folder, say))
    scoring = Scoring(**chosen(options, Scoring))
    notes, training, held_out = data_of(run, options.data)
    pipeline = Pipeline.load(run, options.device)
    config = notes["config"]
    classifier = classifier_of(
        run, training, held_out, notes["data"], scoring.classifier_seconds, config.seed,
        options.device, say,
    )  # fmt: skip
    if classifier and classifier.notes.accuracy < TRUSTED:
        say(
            f"the classifier is right on {classifier.notes.accuracy:.1%} of held-out images only: "
            "images are compared by their latents instead"
        )
        classifier = None
    with warnings.catch_warnings(action="ignore", category=CaptionCut):
        result, images = evaluate(
            pipeline, training, held_out, scoring.captions, options.steps, options.guidance,
            prompts_of(config) if training.readable else None, classifier and classifier.features,
            SEED + scoring.seed,
        )  # fmt: skip
    if classifier:
        result["features"] = {"kind": "classifier", "accuracy": classifier.notes.accuracy}
    with replacing(run / "eval.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    pair = np.concatenate([images["samples"], images["nearest"]])
    sheet = grid(pair, columns=len(images["samples"]), labels=["generated", "nearest"])
    save_image(run / "samples" / "nearest.png", sheet)
    print(table(result))
    say(f"the generated images nearest to training ones: {run / 'samples' / 'nearest.png'}")
