"""Pictures to begin with: a sketch, one of which a part is painted anew, a small one, a map."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from tinyldm.backend import Array, array_module
from tinyldm.data.images import from_uint8, mask_pixels, picture_pixels
from tinyldm.diffusion.samplers import Predict
from tinyldm.sampling.params import SamplingParams
from tinyldm.sampling.tasks import TASKS, random_masks, reduced, sees_all, stretched, times_larger

Images = Image.Image | Sequence[Image.Image]  # one for all, or one for each prompt


@dataclass(frozen=True)
class Scene:
    """pictures: uint8 (n, height, width, 3). hidden: bool (n, height, width), True where they are
    to be painted anew while the rest stays; None: everywhere, the pictures being a sketch, or what
    the model's task asks for: small ones enlarged again, or maps. n may be 1 for all of a batch:
    then the autoencoder sees it once.
    """

    pictures: np.ndarray
    hidden: np.ndarray | None = None

    @classmethod
    def of(
        cls, image: Images, mask: Images | None, params: SamplingParams, task: str = TASKS[0]
    ) -> "Scene":
        """From PIL images, stretched to the params' size. ValueError where they do not fit."""
        alike = all(one is None or isinstance(one, Image.Image) for one in (image, mask))
        n, sides = 1 if alike else len(params.prompts), (params.height, params.width)
        small = [side // times_larger(task) for side in sides]
        pictures = [picture_pixels(one, *small) for one in each("image", image, n)]
        if mask is None:
            return cls(stretched(np.stack(pictures), *sides))
        hidden = [mask_pixels(one, *sides) for one in each("mask", mask, n)]
        return cls(np.stack(pictures), np.stack(hidden))

    @classmethod
    def example(
        cls, task: str, pictures: np.ndarray, maps: np.ndarray | None, rng: np.random.Generator
    ) -> "Scene":
        """What a task gives of pictures that are known, uint8 (n, h, w, 3), to learn it from.

        maps: of layout, like the pictures. rng: draws the hidden parts of inpainting.
        """
        h, w = pictures.shape[1:3]
        if task == "inpainting":
            return cls(pictures, random_masks(rng, len(pictures), h, w))
        if task == "layout":
            return cls(maps)
        return cls(stretched(reduced(pictures, times_larger(task)), h, w))

    def pick(self, some: slice) -> "Scene":
        """Only these of its pictures."""
        return Scene(self.pictures[some], None if self.hidden is None else self.hidden[some])

    def beside(self, task: str, to_latents: Callable[[np.ndarray], Array], factor: int) -> Array:
        """What the U-Net sees of it (n, h, w, c + 1) for inpainting: where it is hidden, and the
        rest; else (n, h, w, c). to_latents: of pixels in −1…1, `factor` a side for each latent.
        """
        if task != "inpainting":
            return to_latents(from_uint8(self.pictures))
        seen = to_latents(self.rest())
        xp = array_module(seen)
        return xp.concatenate([xp.asarray(self.hidden_latents(factor)), seen], axis=-1)

    def rest(self) -> np.ndarray:
        """Its pixels in −1…1, 0 where they are hidden."""
        return from_uint8(self.pictures) * ~self.hidden[..., None]

    def hidden_latents(self, factor: int) -> np.ndarray:
        """float32 (n, h, w, 1): 1 where a latent is hidden, by its nearest pixel (as diffusers)."""
        return self.hidden[:, ::factor, ::factor, None].astype(np.float32)


def each(name: str, images: Images, n: int) -> list[Image.Image]:
    """One for each of n prompts. ValueError where it is not that."""
    images = [images] * n if isinstance(images, Image.Image) else list(images)
    if len(images) != n or not all(isinstance(image, Image.Image) for image in images):
        kinds = ", ".join(dict.fromkeys(type(image).__name__ for image in images))
        raise ValueError(
            f"{name}: expected a PIL image, or {n} for {n} prompts, found {len(images)} {kinds}"
        )
    return images


def strength_of(task: str, image: bool, mask: bool, strength: float | None) -> float | None:
    """The strength of a call that has an image and a mask or has not.

    ValueError where the task wants an image, or leaves no place for a mask or strength.
    """
    if sees_all(task):
        if not image:
            raise ValueError(f"image: expected one: what this model does is {task}")
        if mask or strength is not None:
            raise ValueError(f"mask and strength: not for {task}, which sees all of the image")
        return None
    if not image:
        if mask or strength is not None:
            raise ValueError("mask and strength: expected an image with them")
        return None
    return strength if strength is not None else 1.0 if mask else 0.8


@dataclass(frozen=True)
class Entry:
    """Where the reverse process begins, and what it is given on the way."""

    x: Array  # noise or noisy latents (n, h, w, c)
    options: dict = field(default_factory=dict)  # of the sampler
    beside: Array | None = None  # (n or 1, h, w, …): what the model's task has it see beside x


def enter(
    params: SamplingParams,
    scene: Scene | None,
    noise: Array,
    alphas_bar: np.ndarray,
    to_latents: Callable[[np.ndarray], Array],
    factor: int,
    task: str,
) -> Entry:
    """The entry of a scene, or of noise alone.

    A sketch enters with so much noise as the params' strength says (Meng et al. 2021, SDEdit).
    Where a part is hidden, a model that inpaints sees the rest of it, and where that is; with any
    other the known part is put back after each step, as noisy as the rest then is (Lugmayr et al.
    2022, eq. 8).

    noise: unit normal (n, h, w, c). alphas_bar: ᾱ at which each of the params' steps begins.
    to_latents: of pixels in −1…1, `factor` of them a side for each latent.
    """
    xp = array_module(noise)
    if sees_all(task):
        return Entry(noise, beside=scene.beside(task, to_latents, factor))
    inpaints = task == "inpainting"
    if scene is None and not inpaints:
        return Entry(noise)
    if scene is None:  # to a model that inpaints: nothing is known
        scene = Scene(np.zeros((1, params.height, params.width, 3), np.uint8))
    masked = scene.hidden is not None
    if not masked:
        scene = Scene(scene.pictures, np.ones(scene.pictures.shape[:3], bool))
    anew = scene.hidden_latents(factor)
    if not anew.any(axis=(1, 2, 3)).all():
        raise ValueError(
            f"mask: expected white areas of {factor} pixels or more, the size of a latent, where "
            "to paint anew; found none"
        )
    anew = xp.asarray(anew)
    begin = params.steps - params.steps_taken
    alphas_bar = alphas_bar[begin:].tolist()
    sketched = params.strength is not None and (begin > 0 or not masked)
    puts_back = masked and not inpaints
    z = to_latents(from_uint8(scene.pictures)) if sketched or puts_back else None

    def noisy(alpha_bar):
        return math.sqrt(alpha_bar) * z + math.sqrt(1 - alpha_bar) * noise

    x, options = noise, {}
    if sketched:
        x, options["start"] = noisy(alphas_bar[0]), begin
    if inpaints:
        return Entry(x, options, scene.beside(task, to_latents, factor))
    if puts_back:
        after = [*alphas_bar[1:], 1.0]
        options["post_step"] = lambda x, i: anew * x + (1 - anew) * noisy(after[i])
    return Entry(x, options)


def seeing(predict: Predict, beside: Array) -> Predict:
    """A `predict` of x, from that of x and what is beside it, as often as it takes."""
    xp = array_module(beside)

    def predict_beside(x, t):
        copies = [beside] * (len(x) // len(beside))  # with guidance two, of one for all many
        return predict(xp.concatenate([x, xp.concatenate(copies)], axis=-1), t)

    return predict_beside
