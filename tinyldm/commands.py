"""What the commands of the command line do. Each takes the parsed options."""

import json
import sys
import time
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinyldm import __version__
from tinyldm.again import Origin
from tinyldm.backend import describe
from tinyldm.data.dataset import DataError
from tinyldm.evaluation.metrics import evaluate, table
from tinyldm.evaluation.pictures import grid, picture_format, save_picture
from tinyldm.files import replacing
from tinyldm.models.tokenizer import CaptionCut
from tinyldm.pipeline import Pipeline
from tinyldm.training.preparation import load_data
from tinyldm.training.presets import make_config
from tinyldm.training.rehearsal import duration
from tinyldm.training.runs import rebuild, resume, train
from tinyldm.training.state import load_notes, state_files


def run_train(options: Namespace) -> None:
    """Train a new run, or go on with one, and print its folder."""
    _say_device(options)
    started = time.monotonic()
    settings = {name: getattr(options, name) for name in ("data", "keep", "seed", "skip_bad")}
    sizes = {name: getattr(options, name) for name in ("preset", "size", "minutes")}
    if options.resume:
        resume(options.out, options.device, say=_say, **settings, **sizes)
    else:
        given = {name: value for name, value in settings.items() if value is not None}
        config = make_config(**sizes, **given)
        train(options.out, config, options.device, options.overwrite, say=_say)
    _say(
        f"trained in {duration(time.monotonic() - started)}; paint with: tinyldm sample "
        f'{options.out} "…" -o picture.png'
    )
    print(options.out)


def run_demo(options: Namespace) -> None:
    """Train on the embedded shapes, and score the result."""
    run_train(options)
    _say("scoring: 200 captions are painted and read back by rule")
    options.run, options.captions, options.steps, options.guidance = options.out, 200, None, None
    run_eval(options)
    samples = Path(options.out) / "samples"
    _say(
        f"\nLook at {samples / 'samples.png'} (its last six captions pair a colour with a shape as "
        f"no training picture did),\nat {samples / 'reverse.webp'} (noise becoming pictures), and "
        "try:\n"
        f'  tinyldm sample {options.out} "a large red circle on blue at the left" -o circle.png\n'
        f'  tinyldm sample {options.out} "a small white triangle on black at the top" --n 4 '
        "--seed 7 -o triangle.png\n"
        f"  tinyldm eval {options.out}"
    )


def run_sample(options: Namespace) -> None:
    """Paint pictures from a prompt, or one again from what it says of itself; print their names."""
    if options.again:
        origins, output, pipeline = _again(options)
    elif options.run is None or options.prompt is None:
        options.parser.error("expected RUN and PROMPT, or --again FILE")
    else:
        origins, output, pipeline = _from_prompt(options)
    recipe = origins[0].recipe
    progress = tqdm(
        pipeline.denoise(recipe), total=recipe.steps, desc="painting", unit="step", disable=None
    )
    *_, (latents, _) = progress
    pictures = pipeline.decode(latents)
    for origin in origins:
        name = output if len(origins) == 1 else output.with_stem(f"{output.stem}-{origin.i}")
        save_picture(name, Image.fromarray(pictures[origin.i]), origin.notes())
        print(name)


def _from_prompt(options):
    """→ where each picture comes from, what to call them, and the pipeline that paints them."""
    output = Path(options.output or "sample.png")
    if picture_format(output) != "PNG":  # complains before the work rather than after it
        _say(f"{output}: only a .png says how it was painted, for --again")
    pipeline = Pipeline.load(_whole_run(options.run), options.device)
    recipe = pipeline.recipe(
        [options.prompt] * (options.n or 1),
        options.negative or "",
        options.steps,
        options.guidance,
        options.sampler,
        options.seed or 0,
        options.size,
    )
    weights = pipeline.fingerprint()
    n = len(recipe.prompts)
    return [Origin(recipe, i, weights, options.run) for i in range(n)], output, pipeline


def _again(options):
    """The same for a picture that says where it comes from, and leaves nothing else to choose."""
    for name in ("prompt", "negative", "steps", "guidance", "sampler", "seed", "n", "size"):
        if getattr(options, name) is not None:
            options.parser.error(f"--again takes everything from the picture: leave out the {name}")
    origin = Origin.read(options.again)
    output = Path(options.output or options.again.with_stem(f"{options.again.stem}-again"))
    picture_format(output)
    run = options.run or origin.run
    pipeline = Pipeline.load(_whole_run(run), options.device)
    origin = origin.checked(pipeline, run)
    return [origin], output, pipeline


def run_eval(options: Namespace) -> None:
    """Score a run on its own data: a table, eval.json and samples/nearest.png."""
    run = Path(_whole_run(options.run))
    notes = load_notes(run)
    config = replace(notes["config"], data=options.data or notes["config"].data)
    pipeline = Pipeline.load(run, options.device)
    data = load_data(config)
    if data.fingerprint() != notes["data"]:  # which of them it never saw is no longer known
        raise DataError(
            f"{config.data}: the {len(data):,} pictures and captions are no longer those that "
            f"{run} was trained on; bring them back, or name their folder with --data"
        )
    training, held_out = data.split(config.held_out, config.seed)
    shapes = config.data == "shapes"
    with warnings.catch_warnings(action="ignore", category=CaptionCut):
        result, pictures = evaluate(
            pipeline, training, held_out, options.captions, options.steps, options.guidance, shapes
        )
    with replacing(run / "eval.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    pair = np.concatenate([pictures["samples"], pictures["nearest"]])
    sheet = grid(pair, columns=len(pictures["samples"]), labels=["painted", "nearest"])
    save_picture(run / "samples" / "nearest.png", sheet)
    print(table(result))
    _say(f"the painted pictures nearest to training ones: {run / 'samples' / 'nearest.png'}")


def _whole_run(run):
    """`run`, its component folders made again if the last export was cut off."""
    if not (Path(run) / "model_index.json").exists() and state_files(run):
        if load_notes(run)["stage"] == "denoiser":
            _say(f"{run}: the export is not whole; making it again from the state")
        rebuild(run)
    return run


def _say_device(options):
    _say(f"tinyldm {__version__}: {describe(options.device)}")


def _say(line):
    print(line, file=sys.stderr, flush=True)
