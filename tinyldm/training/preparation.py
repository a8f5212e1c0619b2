"""Preparation of a run: the images, the tokenizer, and a folder to write to."""

import contextlib
import errno
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tinyldm.checkpoints.components import COMPONENTS
from tinyldm.checkpoints.diffusers_folder import CHECKSUMS
from tinyldm.config import ConfigError
from tinyldm.data.dataset import DataError, Dataset
from tinyldm.data.folder import holds_images, load_folder
from tinyldm.data.formats import find_arrays, load_arrays
from tinyldm.data.images import from_uint8, in_channels, to_uint8
from tinyldm.data.shapes import Attributes, make_shapes
from tinyldm.data.tokenizer import CaptionCut, Tokenizer
from tinyldm.models import ClassNames
from tinyldm.training.config import Config
from tinyldm.training.state import state_files

LONGEST_CAPTION = 77  # tokens, as in Stable Diffusion
MOST_CLASSES = 1000  # as ImageNet has; more are likely to be captions
OF_A_RUN = ("training", "samples", "tokenizer", "scheduler", *COMPONENTS)  # folders that it makes

WRITTEN = (  # patterns of the files of a run, besides those of its components
    "training/state-*.safetensors",
    "training/state-*.safetensors.damaged",
    "training/metrics.jsonl",
    "training/skipped.txt",
    "samples/step-*.png",
    *(
        f"samples/{name}"
        for name in (
            "data.png", "maps.png", "forward.png", "reconstructions.png", "samples.png",
            "guidance.png", "words.png", "reverse.png", "reverse.webp", "loss.png",
            "loss-autoencoder.png", "loss-denoiser.png", "loss-by-noise.png", "nearest.png",
        )
    ),
    *(
        f"tokenizer/{name}"
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "classes.json")
    ),
    "scheduler/scheduler_config.json",
)  # fmt: skip
NAMES = [Path(name).name for name in WRITTEN]
ABOUT = ("eval.json", "report.html", "live.html")  # what other commands write about a run
NAMES += ["config.json", "model_index.json", CHECKSUMS, *ABOUT]
NAMES += [file for _, _, file in COMPONENTS.values()]
_names = "|".join(re.escape(name).replace(r"\*", "[0-9]+") for name in NAMES)
TEMPORARY = re.compile(rf"\.({_names})-[a-z0-9_]{{8}}")  # what `replacing` writes first

Say = Callable[[str], None]


def load_data(config: Config) -> Dataset:
    """Load all the images of a run. DataError where they cannot be used."""
    maps = config.task == "layout"
    if config.data == "shapes":
        drawn = config.images, config.side, config.seed
        images, captions = make_shapes(*drawn)
        names = [f"shape {i}" for i in range(len(images))]
        layouts = make_shapes(*drawn, maps=True)[0] if maps else None
        readable = config.condition != "none" and not config.grey
        data = Dataset(images, captions, names, maps=layouts, readable=readable)
    elif not holds_images(Path(config.data)) and (arrays := find_arrays(Path(config.data))):
        if maps:
            raise DataError(
                f"{config.data}: layout needs maps, as files beside those of a folder of images; "
                "found arrays"
            )
        data = load_arrays(arrays, config.sides)
    else:
        data = load_folder(config.data, config.sides, config.skip_bad, maps)
    if config.grey:
        data = replace(data, images=to_uint8(in_channels(from_uint8(data.images), 1)))
    prompt = prompts_of(config)
    return replace(data, captions=[prompt(caption) for caption in data.captions])


def prompts_of(config: Config) -> Callable[[str], str]:
    """Return the function from a caption to the run's prompt: itself, its class, or nothing."""
    if config.condition == "none":
        return lambda caption: ""
    if config.has_classes and config.data == "shapes":
        return lambda caption: Attributes.parse(caption).shape
    return lambda caption: caption


def split(data: Dataset, config: Config) -> tuple[Dataset, Dataset]:
    """Split the data → (training, held out); with `config.flip`, mirror images join training."""
    training, held_out = data.split(config.held_out, config.seed)
    return (training.with_mirror_images() if config.flip else training), held_out


def fit_tokenizer(
    config: Config, captions: list[str], say: Say
) -> tuple[Tokenizer | ClassNames, Config]:
    """Train a tokenizer on the captions → it, and the config with as many tokens as they need.

    For a run with classes it holds their names. DataError where the captions are no classes.
    """
    if config.has_classes:
        names = sorted(set(captions))
        if "" in names or not 2 <= len(names) <= MOST_CLASSES:
            raise DataError(
                f"{config.data}: expected 2…{MOST_CLASSES} classes, such as one sub-folder each, "
                f"found {len(names)} different captions"
                + " and images without one" * ("" in names)
                + "; take --condition text, or none"
            )
        say(f"{len(names)} classes: {', '.join(names[:12])}{', …' * (len(names) > 12)}")
        return ClassNames(names), config
    tokenizer = Tokenizer.train(captions, config.vocabulary, LONGEST_CAPTION)
    with warnings.catch_warnings(record=True, action="always", category=CaptionCut) as cut:
        ids = tokenizer(list(dict.fromkeys(captions)))
    if cut:
        say(f"{len(cut)} captions are longer than {LONGEST_CAPTION} tokens and are cut there")
    longest = int((ids != tokenizer.end_id).sum(axis=1).max()) + 1
    tokens = max(config.tokens, min(longest, LONGEST_CAPTION))
    if len(set(captions)) == 1:
        say(f"every caption is {captions[0]!r}: the model is unconditional, its guidance is 1")
        config = replace(config, guidance=1.0)
    tokenizer = Tokenizer(tokenizer.vocab, tokenizer.merges, tokens)
    return tokenizer, replace(config, tokens=tokens)


def refuse_folder(run: Path, config: Config, overwrite: bool) -> None:
    """Raise FileExistsError or ConfigError rather than lose or mix up what is there."""
    if run.exists() and not run.is_dir():
        raise FileExistsError(f"{run}: expected a folder, or nothing, found a file")
    if run.resolve().parent == run.resolve():
        raise ConfigError(
            f"{run}: is the root of the file system; take a folder of its own as --out"
        )
    holds_model = (run / "model_index.json").exists()
    holds_one = state_files(run) or holds_model
    if holds_model and overwrite and not state_files(run):
        raise FileExistsError(
            f"{run}: holds a model without its training states, which was not trained here and is "
            "not overwritten; take another --out"
        )
    if holds_one and not overwrite:
        raise FileExistsError(
            f"{run}: holds a run already; go on with it (--resume), take another --out, or replace "
            "it (--overwrite)"
        )
    in_the_way = [name for name in OF_A_RUN if any((run / name).glob("[!.]*"))]
    if in_the_way and not holds_one:
        raise FileExistsError(
            f"{run}: holds no run, but something else in {', '.join(in_the_way)}, where a run "
            "would write; take another --out"
        )
    if config.data == "shapes":
        return
    data = Path(config.data).resolve()
    if run.resolve().is_relative_to(data):
        raise ConfigError(
            f"{run}: lies in the folder of images, and its samples would become training data; "
            "take an --out outside"
        )
    if any(data.is_relative_to((run / name).resolve()) for name in OF_A_RUN):
        raise ConfigError(f"{config.data}: lies where the run {run} writes; take another --out")


def remove(run: Path) -> None:
    """Remove the files that a run consists of, and no other that somebody may have put there.

    OSError for one that cannot be removed; the checksums, without which it counts as cut off, go
    first.
    """
    files = [run / name for name in (CHECKSUMS, "model_index.json", *ABOUT)]
    files += [run / name / file for name, (_, _, file) in COMPONENTS.items()]
    files += [run / name / "config.json" for name in COMPONENTS]
    for pattern in WRITTEN:
        files += sorted(run.glob(pattern))
    files = [file for file in files if file.exists()]
    for folder in sorted({file.parent for file in files}):
        if not os.access(folder, os.W_OK):  # nothing is removed, rather than a part
            raise PermissionError(errno.EACCES, "a run that cannot be replaced", str(folder))
    for file in files:
        file.unlink()
    for name in OF_A_RUN:
        with contextlib.suppress(OSError):  # where somebody's file is in it
            (run / name).rmdir()


def remove_leftovers(run: Path) -> None:
    """Remove the temporary files of a process that ended while it wrote; hold the run's lock."""
    for folder in (run, *(run / name for name in OF_A_RUN)):
        for file in folder.glob(".*"):
            if TEMPORARY.fullmatch(file.name) and file.is_file():
                file.unlink()


def describe_data(training: Dataset, held_out: Dataset, say: Say) -> None:
    """Print what to know of the data before hours are spent on them."""
    height, width = training.images.shape[1:3]
    say(
        f"{len(training):,} images of {height}×{width} to train on"
        + (f", {len(held_out)} held out" if len(held_out) else "")
    )
    for remark in training.notes:
        say(f"  {remark}")
    for line in training.skipped:
        say(f"  left out: {line}")
    if not held_out:
        say("  too few to hold any out: there will be no validation loss")
    if (training.images == training.images[0]).all():
        say("  they are all equal: this image is all that can be learnt")
