"""What `tinyldm sample` does: paint from a prompt, or once more what a PNG says of itself."""

import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinyldm.evaluation.pictures import (
    check_picture,
    grid,
    picture_format,
    save_animation,
    save_picture,
)
from tinyldm.sampling.init_image import Scene, strength_of
from tinyldm.sampling.metadata import Given, Origin, fingerprint
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.run import rebuild
from tinyldm.training.state import load_notes, state_files

ANIMATIONS = ("WEBP", "GIF")
FRAMES = 10  # of a film, unless it is said how many
FRAME_SIDE = 256  # pixels, at most, of a picture in a strip


def run_sample(options: Namespace) -> None:
    """Paint pictures from a prompt, or one again from what it says of itself; print their names."""
    if options.prompt is None and options.image is not None and not options.again:
        options.prompt = ""
    if not options.again and (options.run is None or options.prompt is None):
        options.parser.error("expected RUN and PROMPT, or --again FILE")
    for name, wanted in (("every", "film"), ("variation_seed", "variation")):
        if getattr(options, name) is not None and getattr(options, wanted) is None:
            option = name.replace("_", "-")
            options.parser.error(f"--{option}: expected --{wanted} with it")
    film = Film(Path(options.film), options.every) if options.film else None
    bar = tqdm(total=1, desc="loading", bar_format="{desc}", leave=False, disable=None)
    origins, output, pipeline = _again(options) if options.again else _from_prompt(options)
    bar.close()
    origin = origins[0]
    names = [
        output if len(origins) == 1 else output.with_stem(f"{output.stem}-{one.i}")
        for one in origins
    ]
    notes = [one.notes() for one in origins]
    given = [one.file for one in (origin.image, origin.mask) if one]
    check_outputs([*names, *([film.file] if film else [])], [*given, options.again])
    pipeline.check_tile(origin.tile)
    recipe, n = origin.recipe, len(origin.recipe.prompts)
    scene = None
    if origin.image:
        image, mask = (given and given.open() for given in (origin.image, origin.mask))
        scene = Scene.of(image, mask, recipe, pipeline.task)
    # The decoder takes about as long as a step, and so counts as one.
    with tqdm(total=recipe.steps_taken + 1, desc="painting", unit="step", disable=None) as bar:
        steps = pipeline.denoise(recipe, None, scene, origin.tile)
        for i, (latents, x0) in enumerate(steps, 1):
            bar.update()
            last = i == recipe.steps_taken
            if film and (last or film.wants_grad(i, recipe.steps_taken)):
                film.add(pipeline.decode(x0, origin.tile))
            if last:
                bar.set_description("decoding")
                pictures = pipeline.decode(latents, origin.tile)
        bar.update()
    for name, one, note in zip(names, origins, notes, strict=True):
        save_picture(name, Image.fromarray(pictures[one.i]), note)
        print(name)
    if film:
        film.save(n)
        print(film.file)


def _from_prompt(options):
    """→ where each picture comes from, what to call them, and the pipeline that paints them."""
    output = Path(options.output or "sample.png")
    for name in ("prompt", "negative"):
        if any("\ud800" <= char <= "\udfff" for char in getattr(options, name) or ""):
            options.parser.error(f"{name}: not valid UTF-8")
    if picture_format(output) != "PNG":  # complains before the work rather than after it
        say(f"{output}: only a .png says how it was painted, for --again")
    for name in ("mask", "strength"):
        if getattr(options, name) is not None and options.image is None:
            options.parser.error(f"--{name}: expected --image FILE with it")
    image, mask = (given and Given.of(given) for given in (options.image, options.mask))
    picture = image.open() if image else None
    if mask:
        mask.open()  # complains early too
    pipeline = Pipeline.load(whole_run(options.run), options.device, options.vae)
    strength = strength_of(pipeline.task, picture is not None, mask is not None, options.strength)
    size = options.size
    if picture and size is None:
        size = pipeline.size_like(picture.height, picture.width)
    recipe = pipeline.recipe(
        [options.prompt] * (options.n or 1),
        options.negative or "",
        options.steps,
        options.guidance,
        options.sampler,
        options.seed or 0,
        size,
        strength=strength,
        rescale=options.rescale or 0.0,
        variation=options.variation,
        variation_seed=options.variation_seed or 0,
    )
    weights = fingerprint(pipeline)
    common = {"vae": options.vae, "image": image, "mask": mask, "tile": options.tile}
    n = len(recipe.prompts)
    origins = [Origin(recipe, i, weights, options.run, **common) for i in range(n)]
    return origins, output, pipeline


def _again(options):
    """The same for a picture that says where it comes from, and leaves nothing else to choose."""
    for name in (
        *("prompt", "negative", "steps", "guidance", "sampler", "seed", "n", "size"),
        *("strength", "rescale", "variation", "variation_seed", "tile"),
    ):
        if getattr(options, name) is not None:
            options.parser.error(f"--again takes everything from the picture: leave out the {name}")
    origin = Origin.read(options.again)
    output = Path(options.output or options.again.with_stem(f"{options.again.stem}-again"))
    picture_format(output)
    for name in ("image", "mask", "vae"):  # which may have moved
        place = getattr(options, name)
        if place is not None:
            began = getattr(origin, name)
            if began is None:
                options.parser.error(f"--{name}: the picture was painted without one")
            moved = place if name == "vae" else replace(began, file=place)
            origin = replace(origin, **{name: moved})
    for given in (origin.image, origin.mask):
        if given:
            given.check()
    run = options.run or origin.run
    pipeline = Pipeline.load(whole_run(run), options.device, origin.vae)
    origin = origin.checked(pipeline, run)
    return [origin], output, pipeline


@dataclass
class Film:
    """Every k-th step's pictures: a strip, or an animation where the name of the file says so."""

    file: Path
    every: int | None

    def __post_init__(self):
        self.moves = picture_format(self.file) in ANIMATIONS
        self.frames = []

    def wants_grad(self, i: int, steps: int) -> bool:
        """Whether the i-th of the steps, counted from 1, is shown; the last one is in any case."""
        return i % (self.every or max(1, steps // FRAMES)) == 0

    def add(self, pictures: np.ndarray) -> None:
        """uint8 (n, h, w, 3)."""
        self.frames.append(pictures)

    def save(self, n: int) -> None:
        """Of the strip each of the n pictures is a row; an animation has all of them beside."""
        if self.moves:
            frames = [grid(f) if n > 1 else Image.fromarray(f[0]) for f in self.frames]
            save_animation(self.file, frames)
            return
        frames = np.stack([_reduced(f) for f in self.frames], axis=1)  # (n, frames, h, w, 3)
        save_picture(self.file, grid(np.concatenate(frames), columns=len(self.frames)))


def _reduced(pictures):
    n, h, w, _ = pictures.shape
    scale = FRAME_SIDE / max(h, w)
    if scale >= 1:
        return pictures
    size = round(w * scale), round(h * scale)
    return np.stack([Image.fromarray(p).resize(size, Image.Resampling.LANCZOS) for p in pictures])


def check_outputs(files: list[Path], inputs: list[Path | None]) -> None:
    """ValueError before the work, where a file would replace another or could not be written."""
    taken = [file.resolve() for file in inputs if file]
    for file in files:
        place = file.resolve()
        if place in taken:
            raise ValueError(f"{file}: would replace a picture that is needed; take another name")
        taken.append(place)
        check_picture(file)


def whole_run(run: str) -> str:
    """`run`, its component folders made again if the last export was cut off."""
    folder = Path(run)
    if folder.is_dir() and not (folder / "model_index.json").exists() and state_files(run):
        if load_notes(run)["stage"] == "denoiser":
            say(f"{run}: the export is not whole; making it again from the state")
        rebuild(run)
    return run


def say(line: str) -> None:
    """A line for the person at the terminal; only results go to stdout."""
    print(line, file=sys.stderr, flush=True)
