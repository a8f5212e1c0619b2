"""What the commands of the command line do. Each takes the parsed options."""

import json
import time
import warnings
from argparse import Namespace
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np

from tinyldm import __version__
from tinyldm.cli.sample import say, whole_run
from tinyldm.data.dataset import DataError
from tinyldm.data.tokenizer import CaptionCut
from tinyldm.evaluation.metrics import evaluate, table
from tinyldm.evaluation.pictures import grid, save_picture
from tinyldm.experiments.trained import trained_run
from tinyldm.files import replacing
from tinyldm.models import ClassNames
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.threads import describe
from tinyldm.training.classifier import SECONDS, classifier_of
from tinyldm.training.config import Config
from tinyldm.training.estimate import duration
from tinyldm.training.loop import Diverged
from tinyldm.training.overfit import overfit, report
from tinyldm.training.preparation import load_data, prompts_of, split
from tinyldm.training.presets import make_config
from tinyldm.training.run import resume, train
from tinyldm.training.state import load_notes

ON_A_RUN = ("guidance", "samplers")  # the experiments that take a trained run


def run_train(options: Namespace) -> None:
    """Train a new run, or go on with one, and print its folder."""
    if options.out is None and not options.overfit:
        options.parser.error("the following arguments are required: --out")
    if options.overfit and options.resume:
        options.parser.error("--overfit: begins anew; leave out --resume")
    _say_device(options)
    started = time.monotonic()
    names = ("preset", "size", "minutes", *(field.name for field in fields(Config)))
    settings = {name: getattr(options, name, None) for name in names}
    settings = {name: value for name, value in settings.items() if value is not None}
    of_a_new_run = ("factor", "channels", "accumulate", "decay")
    of_a_new_run = {name: getattr(options, name) for name in of_a_new_run}
    if options.resume:
        for name, value in of_a_new_run.items():
            if value is not None:
                options.parser.error(f"--{name}: the run goes on as it began; leave it out")
        pipeline = resume(options.out, options.device, say=say, **settings)
    else:
        config = make_config(**settings, **of_a_new_run)
        if options.overfit:
            if not report(overfit(config, options.device, say), say):
                raise Diverged("the self-test has failed: on a single batch the loss does not fall")
            return
        pipeline = train(options.out, config, options.device, options.overwrite, say=say)
    say(
        f"trained in {duration(time.monotonic() - started)}; paint with: tinyldm sample "
        f"{options.out} {_what_to_say(pipeline)} -o picture.png"
    )
    print(options.out)


def run_demo(options: Namespace) -> None:
    """Train on the embedded shapes, and score the result."""
    run_train(options)
    say("scoring: 200 captions are painted and read back by rule")
    options.run, options.captions, options.steps, options.guidance = options.out, 200, None, None
    options.classifier_seconds = SECONDS
    run_eval(options)
    samples = Path(options.out) / "samples"
    say(
        f"\nLook at {samples / 'samples.png'} (its last six captions pair a colour with a shape as "
        f"no training picture did),\nat {samples / 'reverse.webp'} (noise becoming pictures), and "
        "try:\n"
        f'  tinyldm sample {options.out} "a large red circle on blue at the left" -o circle.png\n'
        f'  tinyldm sample {options.out} "a small white triangle on black at the top" --n 4 '
        "--seed 7 -o triangle.png\n"
        f"  tinyldm eval {options.out}"
    )


def run_eval(options: Namespace) -> None:
    """Score a run on its own data: a table, eval.json and samples/nearest.png."""
    run = Path(whole_run(options.run))
    notes = load_notes(run)
    config = replace(notes["config"], data=options.data or notes["config"].data)
    pipeline = Pipeline.load(run, options.device)
    data = load_data(config)
    if data.fingerprint() != notes["data"]:  # which of them it never saw is no longer known
        raise DataError(
            f"{config.data}: the {len(data):,} pictures and captions are no longer those that "
            f"{run} was trained on; bring them back, or name their folder with --data"
        )
    training, held_out = split(data, config)
    judge = classifier_of(
        run, training, held_out, notes["data"], options.classifier_seconds, config.seed,
        options.device, say,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore", category=CaptionCut):
        result, pictures = evaluate(
            pipeline, training, held_out, options.captions, options.steps, options.guidance,
            prompts_of(config) if data.readable else None, judge and judge.features,
        )  # fmt: skip
    if judge:
        result["features"] = {"kind": "classifier", "accuracy": judge.notes.accuracy}
    with replacing(run / "eval.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    pair = np.concatenate([pictures["samples"], pictures["nearest"]])
    sheet = grid(pair, columns=len(pictures["samples"]), labels=["painted", "nearest"])
    save_picture(run / "samples" / "nearest.png", sheet)
    print(table(result))
    say(f"the painted pictures nearest to training ones: {run / 'samples' / 'nearest.png'}")


def run_experiment(options: Namespace) -> None:
    """Run one, on seconds of training or on what has been trained, and print its table."""
    module = import_module(f"tinyldm.experiments.{options.name.replace('-', '_')}")
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a folder, or nothing, found a file")
    subject = options.seconds
    if options.name in ON_A_RUN:
        run = whole_run(options.run) if options.run else None
        subject = trained_run(run, options.seconds, out, say)
    elif options.run:
        options.parser.error(f"--run: {options.name} trains its own; leave it out")
    out.mkdir(parents=True, exist_ok=True)
    module.run(subject, out, say)
    print((out / "table.md").read_text(encoding="utf-8"), end="")


def _what_to_say(pipeline):
    """To have it paint: such as a prompt, or an image."""
    prompt = pipeline.tokenizer.names[0] if isinstance(pipeline.tokenizer, ClassNames) else "…"
    given = {"generation": "", "inpainting": " --image FILE --mask FILE"}
    return f'"{prompt}"' + given.get(pipeline.task, " --image FILE")


def _say_device(options):
    say(f"tinyldm {__version__}: {describe(options.device)}")
