"""`tinyldm eval`: score a run on its own data."""

import json
import warnings
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyldm.cli.arguments import add_device, add_options, integer, number, say
from tinyldm.data.dataset import DataError
from tinyldm.data.tokenizer import CaptionCut
from tinyldm.evaluation.figures import grid, save_image
from tinyldm.evaluation.metrics import evaluate, table
from tinyldm.files import replacing
from tinyldm.sampling.params import SamplingParams
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.classifier import SECONDS, classifier_of
from tinyldm.training.preparation import load_data, prompts_of, split
from tinyldm.training.run import whole_run
from tinyldm.training.state import load_notes


def add_arguments(parser: ArgumentParser) -> None:
    """Add the run to score, and the options of scoring."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of the run")
    parser.add_argument("--data", metavar="FOLDER", help="folder where its images are now")
    parser.add_argument(
        "--captions", type=integer(4, 100_000), default=500, metavar="N",
        help="number of images to generate (default: 500)",
    )  # fmt: skip
    parser.add_argument(
        "--classifier-seconds", type=number(0, 100_000), default=SECONDS, metavar="S",
        help="seconds to train the classifier whose features compare images; 0 to compare latents "
        f"(default: {SECONDS:g})",
    )  # fmt: skip
    add_options(parser, SamplingParams, ("steps", "guidance"))
    add_device(parser)


def run(options: Namespace) -> None:
    """Score a run on its own data: a table, eval.json and samples/nearest.png."""
    run = Path(whole_run(options.run_folder, say))
    notes = load_notes(run)
    config = replace(notes["config"], data=options.data or notes["config"].data)
    pipeline = Pipeline.load(run, options.device)
    data = load_data(config)
    if data.fingerprint() != notes["data"]:  # the held-out split is no longer known
        raise DataError(
            f"{config.data}: the {len(data):,} images and captions are no longer those that "
            f"{run} was trained on; bring them back, or name their folder with --data"
        )
    training, held_out = split(data, config)
    classifier = classifier_of(
        run, training, held_out, notes["data"], options.classifier_seconds, config.seed,
        options.device, say,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore", category=CaptionCut):
        result, images = evaluate(
            pipeline, training, held_out, options.captions, options.steps, options.guidance,
            prompts_of(config) if data.readable else None, classifier and classifier.features,
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
