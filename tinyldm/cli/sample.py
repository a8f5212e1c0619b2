"""`tinyldm sample`: generate images from a prompt, or reproduce one from the notes in a PNG."""

import contextlib
import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm.checkpoints.safetensors import WeightsError
from tinyldm.cli.arguments import add_device, add_options, say, size
from tinyldm.evaluation.figures import (
    check_image,
    grid,
    image_format,
    save_animation,
    save_image,
)
from tinyldm.files import shown, some
from tinyldm.models import Tokenizer
from tinyldm.options import option
from tinyldm.progress import Bar
from tinyldm.sampling.init_image import Scene, strength_of
from tinyldm.sampling.metadata import MOST, OPTIONS, InputImage, Origin, fingerprint
from tinyldm.sampling.params import SamplingParams
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.run import whole_run
from tinyldm.training.state import load_notes, state_files

ANIMATIONS = ("WEBP", "GIF")
FRAMES = 10  # of a film, by default
FRAME_SIDE = 256  # pixels, at most, of an image in a strip


@dataclass(frozen=True)
class Output:
    """Options of what is written."""

    n: int = option("number of images", 1, least=1, most=MOST)
    every: int | None = option(
        "steps from one frame of the film to the next", None, least=1,
        default_text=f"{FRAMES} frames in all",
    )  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Add the prompt, the options of sampling, and the input and output files."""

    def file(name, text, kind=Path):
        parser.add_argument(name, metavar="FILE", type=kind, help=text)

    parser.add_argument(
        "run_folder", metavar="RUN", nargs="?",
        help="folder of a run, or a Stable Diffusion: a folder, or one .safetensors file",
    )  # fmt: skip
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="caption of the images")
    parser.add_argument(
        "-o", "--output", metavar="FILE",
        help="file of the image; several are numbered (default: sample.png)",
    )  # fmt: skip
    file("--reproduce", "reproduce the image of this PNG from the notes in it")
    parser.add_argument("--negative", metavar="PROMPT", help="prompt that guidance leads away from")
    add_options(parser, SamplingParams)
    add_options(parser, Output)
    parser.add_argument("--size", type=size, help="size in pixels, S or HEIGHTxWIDTH")
    file("--image", "init image, or the low-resolution image or map of a model that needs one")
    file("--mask", "mask, white where to generate; the rest of --image stays")
    file("--film", "file of a strip of the steps (.png), or an animation of them (.webp, .gif)")
    file("--vae", "another autoencoder, a folder or a file", str)
    add_device(parser)


def run(options: Namespace) -> None:
    """Generate images from a prompt, or reproduce one from its notes; print their file names."""
    if options.prompt is None and options.image is not None and not options.reproduce:
        options.prompt = ""
    if not options.reproduce and (options.run_folder is None or options.prompt is None):
        options.parser.error("expected RUN and PROMPT, or --reproduce FILE")
    for name, wanted in (("every", "film"), ("variation_seed", "variation")):
        if getattr(options, name) is not None and getattr(options, wanted) is None:
            option = name.replace("_", "-")
            options.parser.error(f"--{option}: expected --{wanted} with it")
    film = Film(Path(options.film), options.every) if options.film else None
    bar = Bar(total=1, desc="loading", bar_format="{desc}", leave=False, disable=None)
    origins, output, pipeline = _reproduce(options) if options.reproduce else _from_prompt(options)
    bar.close()
    origin = origins[0]
    names = [
        output if len(origins) == 1 else output.with_stem(f"{output.stem}-{one.i}")
        for one in origins
    ]
    notes = [one.notes() for one in origins]
    inputs = [one.file for one in (origin.image, origin.mask) if one]
    check_outputs([*names, *([film.file] if film else [])], [*inputs, options.reproduce])
    images = generate(pipeline, origin, film)
    for name, one, note in zip(names, origins, notes, strict=True):
        save_image(name, Image.fromarray(images[one.i]), note)
        print(name)
    if film:
        film.save(len(origin.params.prompts))
        print(film.file)


def generate(pipeline: Pipeline, origin: Origin, film: "Film | None") -> np.ndarray:
    """Sample a batch under a progress bar, with frames for the film → uint8 (n, h, w, 3)."""
    params, scene = origin.params, None
    if origin.image:
        image, mask = (one and one.open() for one in (origin.image, origin.mask))
        scene = Scene.of(image, mask, params, pipeline.task)
    # The decoder takes about as long as a step, and so counts as one.
    with Bar(total=params.steps_taken + 1, desc="sampling", unit="step", disable=None) as bar:
        latents = None
        for i, (x, x0) in enumerate(pipeline.denoise(params, None, scene), 1):
            latents = x
            bar.update()
            last = i == params.steps_taken
            if film and (last or film.shows(i, params.steps_taken)):
                film.add(pipeline.decode(x0, params.tile))
        bar.set_description("decoding")
        images = pipeline.decode(latents, params.tile)
        bar.update()
    return images


def _from_prompt(options):
    """Return the origin of each image, the output file, and the pipeline, from a prompt."""
    output = Path("sample.png" if options.output is None else options.output)
    for name in ("prompt", "negative"):
        text = getattr(options, name) or ""
        if any("\ud800" <= char <= "\udfff" for char in text):  # the locale does not know them
            try:
                setattr(options, name, os.fsencode(text).decode())
            except UnicodeError:
                options.parser.error(f"{name}: not valid UTF-8")
    if image_format(output) != "PNG":  # fails before the work rather than after it
        say(f"{output}: only a .png stores how it was generated, for --reproduce")
    for name in ("mask", "strength"):
        if getattr(options, name) is not None and options.image is None:
            options.parser.error(f"--{name}: expected --image FILE with it")
    image, mask = (file and InputImage.of(file) for file in (options.image, options.mask))
    opened = image.open() if image else None
    if mask:
        mask.open()  # fails early, too
    pipeline = Pipeline.load(whole_run(options.run_folder, say), options.device, options.vae)
    settings = {name: getattr(options, name) for name in OPTIONS}
    settings["strength"] = strength_of(
        pipeline.task, opened is not None, mask is not None, options.strength
    )
    size = options.size
    if opened and size is None:
        size = pipeline.size_like(opened.height, opened.width)
    _name_new_words(options.run_folder, pipeline.tokenizer, options.prompt)
    prompts = [options.prompt] * (options.n or 1)
    params = pipeline.sampling_params(prompts, options.negative or "", size, **settings)
    weights = fingerprint(pipeline)
    common = {"vae": options.vae, "image": image, "mask": mask}
    origins = [
        Origin(params, i, weights, options.run_folder, **common) for i in range(len(prompts))
    ]
    return origins, output, pipeline


def _name_new_words(run, tokenizer, prompt):
    """Say which words of a prompt a run was not trained on, where its tokenizer tells."""
    words = tokenizer.in_parts(prompt) if isinstance(tokenizer, Tokenizer) else []
    if not words or not state_files(run):
        return
    with contextlib.suppress(WeightsError):  # of a state, which is not needed to generate
        if len(tokenizer) < load_notes(run)["config"].vocabulary:  # all that occurred twice merged
            say(f"words that no caption had, or one alone: {some(words)}")


def _reproduce(options):
    """Return origin, output file and pipeline from the notes of a PNG, which fix all options."""
    for name in ("prompt", "negative", "n", "size", *OPTIONS):
        if getattr(options, name) is not None:
            options.parser.error(
                f"--reproduce takes everything from the image: leave out the {name}"
            )
    origin = Origin.read(options.reproduce)
    output = options.reproduce.with_stem(f"{options.reproduce.stem}-reproduced")
    output = output if options.output is None else Path(options.output)
    image_format(output)
    for name in ("image", "mask", "vae"):  # which may have moved
        place, began = getattr(options, name), getattr(origin, name)
        if place is not None and began is None:
            options.parser.error(f"--{name}: the image was generated without one")
        if place is not None:
            moved = place if name == "vae" else replace(began, file=place)
            origin = replace(origin, **{name: moved})
        elif began is not None:
            named = began if name == "vae" else began.file
            _check_inside(options.reproduce, named, f"--{name} FILE")
    for one in (origin.image, origin.mask):
        if one:
            one.check()
    folder = options.run_folder or origin.run
    if not options.run_folder:
        words = f"tinyldm sample RUN --reproduce {shown(options.reproduce)}"
        _check_inside(options.reproduce, folder, words)
    pipeline = Pipeline.load(whole_run(folder, say), options.device, origin.vae)
    origin = origin.checked(pipeline, folder)
    return [origin], output, pipeline


def _check_inside(png, named, option):
    """Raise ValueError where a file that a note names lies neither here nor beside the PNG.

    The PNG may be a stranger's. A file that the user names may lie anywhere.
    """
    folders = Path().resolve(), png.resolve().parent
    if not any(Path(named).resolve().is_relative_to(folder) for folder in folders):
        raise ValueError(
            f"{shown(png)}: its note names {shown(named)}, which lies neither in this folder nor "
            f"beside the image; if it is the right one, name it: {option}"
        )


@dataclass
class Film:
    """A film of every k-th step: a strip or an animation, as the suffix of the file says."""

    file: Path
    every: int | None

    def __post_init__(self):
        self.moves = image_format(self.file) in ANIMATIONS
        self.frames = []

    def shows(self, i: int, steps: int) -> bool:
        """Return whether the i-th of the steps, counted from 1, becomes a frame."""
        return i % (self.every or max(1, steps // FRAMES)) == 0

    def add(self, images: np.ndarray) -> None:
        """Add a frame, uint8 (n, h, w, 3)."""
        self.frames.append(images)

    def save(self, n: int) -> None:
        """Save the film: a strip with a row for each of n images, or an animation of them all."""
        if self.moves:
            frames = [grid(f) if n > 1 else Image.fromarray(f[0]) for f in self.frames]
            save_animation(self.file, frames)
            return
        frames = np.stack([_reduced(f) for f in self.frames], axis=1)  # (n, frames, h, w, 3)
        save_image(self.file, grid(np.concatenate(frames), columns=len(self.frames)))


def _reduced(images):
    n, h, w, _ = images.shape
    scale = FRAME_SIDE / max(h, w)
    if scale >= 1:
        return images
    size = round(w * scale), round(h * scale)
    return np.stack([Image.fromarray(p).resize(size, Image.Resampling.LANCZOS) for p in images])


def check_outputs(files: list[Path], inputs: list[Path | None]) -> None:
    """Raise ValueError before the work, where a file would replace another or cannot be written."""
    taken = [file.resolve() for file in inputs if file]
    for file in files:
        place = file.resolve()
        if place in taken:
            raise ValueError(f"{file}: would replace an image that is needed; take another name")
        taken.append(place)
        check_image(file)
