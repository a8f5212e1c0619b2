"""What a painted PNG says of how it was painted, which is enough to paint it again."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm import __version__
from tinyldm.backend import to_device
from tinyldm.data.folder import open_picture
from tinyldm.sampling.params import Recipe
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.threads import map_threads

SOFTWARE = "tinyldm"
MOST = 4096  # pictures of a batch
LARGEST = 2**14  # pixels, a side of a picture that is given


@dataclass(frozen=True)
class Given:
    """A picture that the painting begins with: its file, and a hash of that, in hexadecimal."""

    file: Path
    digest: str

    @classmethod
    def of(cls, file: Path) -> "Given":
        """As it is now. OSError where it is not there, ValueError for a name that is no text."""
        try:
            str(file).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{str(file)!r}: its name is not UTF-8; give it another") from None
        return cls(file, hashlib.sha256(file.read_bytes()).hexdigest()[:16])

    @classmethod
    def read(cls, note: str | None) -> "Given | None":
        """From a note in a PNG."""
        if note is None:
            return None
        digest, _, file = note.partition(" ")
        return cls(Path(file), digest)

    def note(self) -> str:
        """For a PNG."""
        return f"{self.digest} {self.file}"

    def check(self) -> None:
        """ValueError where the file is another one by now."""
        if (now := Given.of(self.file)) != self:
            raise ValueError(
                f"{self.file}: the picture that it began with was {self.digest}, this is "
                f"{now.digest}; bring the other back"
            )

    def open(self) -> Image.Image:
        """In RGB, turned as its EXIF note says; DataError where it cannot be read."""
        return open_picture(self.file, LARGEST)


@dataclass(frozen=True)
class Origin:
    """Where one picture comes from: the i-th of a batch that a recipe and a model make."""

    recipe: Recipe  # its prompts are all the same
    i: int
    weights: str  # the fingerprint of the model
    run: str  # its folder or file, as it was given
    vae: str | None = None  # the same of an autoencoder to take instead
    image: Given | None = None
    mask: Given | None = None
    tile: int | None = None  # of the decoder

    def notes(self) -> dict[str, str]:
        """The text chunks of a PNG."""
        recipe = self.recipe
        rare = {
            "strength": recipe.strength,
            "rescale": recipe.rescale or None,
            "variation": recipe.variation,
            "variation_seed": None if recipe.variation is None else recipe.variation_seed,
            "vae": self.vae,
            "image": self.image and self.image.note(),
            "mask": self.mask and self.mask.note(),
            "tile": self.tile,
        }
        return {name: str(value) for name, value in rare.items() if value is not None} | {
            "software": f"{SOFTWARE} {__version__}",
            "prompt": recipe.prompts[0],
            "negative_prompt": recipe.negatives[0],
            "seed": str(recipe.seed),
            "picture": f"{self.i + 1} of {len(recipe.prompts)}",
            "sampler": recipe.sampler,
            "steps": str(recipe.steps),
            "guidance": repr(float(recipe.guidance)),
            "size": f"{recipe.height}x{recipe.width}",
            "weights": self.weights,
            "run": self.run,
        }

    @classmethod
    def read(cls, file: Path) -> "Origin":
        """From the notes in a PNG. ValueError where there are none, OSError where it has gone."""
        try:
            with Image.open(file, formats=("PNG",)) as picture:
                notes = picture.text
        except (SyntaxError, ValueError, Image.UnidentifiedImageError) as error:
            raise ValueError(f"{file}: expected a PNG painted by tinyldm ({error})") from None
        try:
            i, n = map(int, notes["picture"].split(" of "))
            if not 1 <= i <= n <= MOST:
                raise ValueError(f"picture {i} of {n}")
            height, width = map(int, notes["size"].split("x"))
            recipe = Recipe(
                prompts=(notes["prompt"],) * n,
                negatives=(notes["negative_prompt"],) * n,
                steps=int(notes["steps"]),
                guidance=float(notes["guidance"]),
                sampler=notes["sampler"],
                seed=int(notes["seed"]),
                height=height,
                width=width,
                strength=float(notes["strength"]) if "strength" in notes else None,
                rescale=float(notes.get("rescale", 0)),
                variation=float(notes["variation"]) if "variation" in notes else None,
                variation_seed=int(notes.get("variation_seed", 0)),
            )
            return cls(
                recipe,
                i - 1,
                notes["weights"],
                notes["run"],
                notes.get("vae"),
                Given.read(notes.get("image")),
                Given.read(notes.get("mask")),
                int(notes["tile"]) if "tile" in notes else None,
            )
        except KeyError as error:
            raise ValueError(
                f"{file}: expected a PNG painted by `tinyldm sample`, found no note of {error}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{file}: its notes are not those of tinyldm: {error}") from None

    def checked(self, pipeline: Pipeline, run: str) -> "Origin":
        """The same, if this model of the folder `run` can paint it again; else ValueError."""
        found = fingerprint(pipeline)
        if found != self.weights:
            raise ValueError(
                f"{run}: the picture was painted with weights {self.weights}, these are {found}; "
                "name the folder of the others: tinyldm sample RUN --again FILE"
            )
        r = self.recipe
        size = (r.height, r.width)
        recipe = pipeline.recipe(
            r.prompts, r.negatives, r.steps, r.guidance, r.sampler, r.seed, size,
            strength=r.strength, rescale=r.rescale, variation=r.variation,
            variation_seed=r.variation_seed,
        )  # fmt: skip
        return replace(self, recipe=recipe)


def fingerprint(pipeline: Pipeline) -> str:
    """A hash of weights, configs and tokenizer, in hexadecimal: equal hash, equal model."""

    def digest(named):
        component, name = named
        weights = np.ascontiguousarray(to_device(pipeline.params[component][name], "cpu"))
        return hashlib.sha256(weights).hexdigest()

    names = [
        (component, name) for component in pipeline.params for name in pipeline.params[component]
    ]
    parts = dict(zip(map("/".join, names), map_threads(digest, names), strict=True))
    parts["tokenizer"] = list(pipeline.tokenizer.content.values())
    for component, config in pipeline.configs.items():
        parts[component] = {k: v for k, v in config.items() if not k.startswith("_")}
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
