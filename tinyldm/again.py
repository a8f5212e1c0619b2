"""What a painted PNG says of how it was painted, which is enough to paint it again."""

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from tinyldm import __version__
from tinyldm.pipeline import Pipeline, Recipe

SOFTWARE = "tinyldm"
MOST = 4096  # pictures of a batch


@dataclass(frozen=True)
class Origin:
    """Where one picture comes from: the i-th of a batch that a recipe and a model make."""

    recipe: Recipe  # its prompts are all the same
    i: int
    weights: str  # the fingerprint of the model
    run: str  # its folder, as it was given

    def notes(self) -> dict[str, str]:
        """The text chunks of a PNG."""
        recipe = self.recipe
        return {
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
            )
            return cls(recipe, i - 1, notes["weights"], notes["run"])
        except KeyError as error:
            raise ValueError(
                f"{file}: expected a PNG painted by `tinyldm sample`, found no note of {error}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{file}: its notes are not those of tinyldm: {error}") from None

    def checked(self, pipeline: Pipeline, run: str) -> "Origin":
        """The same, if this model of the folder `run` can paint it again; else ValueError."""
        found = pipeline.fingerprint()
        if found != self.weights:
            raise ValueError(
                f"{run}: the picture was painted with weights {self.weights}, these are {found}; "
                "name the folder of the others: tinyldm sample RUN --again FILE"
            )
        r = self.recipe
        size = (r.height, r.width)
        recipe = pipeline.recipe(
            r.prompts, r.negatives, r.steps, r.guidance, r.sampler, r.seed, size
        )
        return replace(self, recipe=recipe)
