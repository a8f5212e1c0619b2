"""Image inputs of a sampling call: img2img, inpainting, super-resolution, layout."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from tinyldm.backend import Array, array_module
from tinyldm.config import brief
from tinyldm.data.images import from_uint8, image_pixels, mask_pixels
from tinyldm.diffusion.samplers import Predict
from tinyldm.sampling.params import SamplingParams
from tinyldm.sampling.tasks import (
    TASKS,
    random_masks,
    reduced,
    stretched,
    takes_whole_image,
    times_larger,
)

Images = Image.Image | Sequence[Image.Image]  # one for all, or one for each prompt


@dataclass(frozen=True)
class Scene:
    """Image inputs of a sampling call. images: uint8 (n, height, width, 3), init images or, for a
    task, enlarged low-resolution images or maps. mask: bool (n, height, width), True
    where to generate while the rest stays; None: everywhere. n may be 1 for all of a batch: then
    the autoencoder encodes it once.
    """

    images: np.ndarray
    mask: np.ndarray | None = None

    @classmethod
    def of(
        cls, image: Images, mask: Images | None, params: SamplingParams, task: str = TASKS[0]
    ) -> "Scene":
        """Convert PIL images, resized to the params' size. ValueError where they do not fit."""
        alike = all(one is None or isinstance(one, Image.Image) for one in (image, mask))
        n, sides = 1 if alike else len(params.prompts), (params.height, params.width)
        small = [side // times_larger(task) for side in sides]
        images = [image_pixels(one, *small) for one in each("image", image, n)]
        if mask is None:
            return cls(stretched(np.stack(images), *sides))
        masks = [mask_pixels(one, *sides) for one in each("mask", mask, n)]
        return cls(np.stack(images), np.stack(masks))

    @classmethod
    def example(
        cls, task: str, images: np.ndarray, maps: np.ndarray | None, rng: np.random.Generator
    ) -> "Scene":
        """Make the input of a task from known images, uint8 (n, h, w, 3), to learn it from.

        maps: the layout maps, like the images. rng: draws the masks of inpainting.
        """
        h, w = images.shape[1:3]
        if task == "inpainting":
            return cls(images, random_masks(rng, len(images), h, w))
        if task == "layout":
            return cls(maps)
        return cls(stretched(reduced(images, times_larger(task)), h, w))

    def pick(self, some: slice) -> "Scene":
        """Select a slice of the images."""
        return Scene(self.images[some], None if self.mask is None else self.mask[some])

    def concat_conditioning(
        self, task: str, to_latents: Callable[[np.ndarray], Array], factor: int
    ) -> Array:
        """Return the concatenation conditioning, (n, h, w, c + 1) for inpainting: mask and masked
        image; else (n, h, w, c). to_latents: of pixels in −1…1, `factor` a side for each latent.
        """
        if task != "inpainting":
            return to_latents(from_uint8(self.images))
        seen = to_latents(self.rest())
        xp = array_module(seen)
        return xp.concatenate([xp.asarray(self.latent_mask(factor)), seen], axis=-1)

    def rest(self) -> np.ndarray:
        """Return the pixels of the images in −1…1, 0 where they are masked."""
        return from_uint8(self.images) * ~self.mask[..., None]

    def latent_mask(self, factor: int) -> np.ndarray:
        """Return the latents' mask, float32 (n, h, w, 1): 1 by the nearest pixel (as diffusers)."""
        return self.mask[:, ::factor, ::factor, None].astype(np.float32)


def each(name: str, images: Images, n: int) -> list[Image.Image]:
    """Return one image for each of n prompts. ValueError for any other number, type or size."""
    one = isinstance(images, (Image.Image, str, bytes)) or not isinstance(images, Iterable)
    found = brief(images)
    images = [images] * n if one else list(images)
    if len(images) != n or not all(isinstance(image, Image.Image) for image in images):
        kinds = ", ".join(dict.fromkeys(type(image).__name__ for image in images))
        found = found if one else f"{len(images)} {kinds}"
        raise ValueError(f"{name}: expected a PIL image, or {n} for {n} prompts, found {found}")
    if not all(min(image.size) for image in images):
        raise ValueError(f"{name}: expected an image of one pixel or more, found one of none")
    return images


def strength_of(task: str, image: bool, mask: bool, strength: float | None) -> float | None:
    """Return the strength of a sampling call, with or without image and mask.

    ValueError where the task needs an image, or allows no mask or strength.
    """
    if takes_whole_image(task):
        if not image:
            raise ValueError(f"image: expected one, which the task {task} needs")
        if mask or strength is not None:
            raise ValueError(f"mask and strength: not for {task}, which needs all of the image")
        return None
    if not image:
        if mask or strength is not None:
            raise ValueError("mask and strength: expected an image with them")
        return None
    return strength if strength is not None else 1.0 if mask else 0.8


@dataclass(frozen=True)
class Entry:
    """Start of the reverse process, and its conditioning by concatenation."""

    x: Array  # noise or noisy latents (n, h, w, c)
    options: dict = field(default_factory=dict)  # of the sampler
    concat: Array | None = None  # (n or 1, h, w, …): concatenated to x


def enter(
    params: SamplingParams,
    scene: Scene | None,
    noise: Array,
    alphas_bar: np.ndarray,
    to_latents: Callable[[np.ndarray], Array],
    factor: int,
    task: str,
) -> Entry:
    """Return the start of the reverse process, from a scene or from noise alone.

    An init image starts at the noise level of the params' strength (Meng et al. 2021, SDEdit).
    With a mask, an inpainting model is conditioned on the mask and the masked image; with any other
    the known part is put back after each step, at the noise level of that step (Lugmayr et al.
    2022, eq. 8).

    noise: unit normal (n, h, w, c). alphas_bar: ᾱ at which each of the params' steps begins.
    to_latents: of pixels in −1…1, `factor` of them a side for each latent.
    """
    xp = array_module(noise)
    if takes_whole_image(task):
        return Entry(noise, concat=scene.concat_conditioning(task, to_latents, factor))
    inpaints = task == "inpainting"
    if scene is None and not inpaints:
        return Entry(noise)
    if scene is None:  # for an inpainting model: everything is masked
        scene = Scene(np.zeros((1, params.height, params.width, 3), np.uint8))
    masked = scene.mask is not None
    if not masked:
        scene = Scene(scene.images, np.ones(scene.images.shape[:3], bool))
    anew = scene.latent_mask(factor)
    if not anew.any(axis=(1, 2, 3)).all():
        raise ValueError(
            f"mask: expected white areas of {factor} pixels or more, the size of a latent, where "
            "to generate; found none"
        )
    anew = xp.asarray(anew)
    begin = params.steps - params.steps_taken
    alphas_bar = alphas_bar[begin:].tolist()
    has_init = params.strength is not None and (begin > 0 or not masked)
    puts_back = masked and not inpaints
    z = to_latents(from_uint8(scene.images)) if has_init or puts_back else None

    def noisy(alpha_bar):
        return math.sqrt(alpha_bar) * z + math.sqrt(1 - alpha_bar) * noise

    x, options = noise, {}
    if has_init:
        x, options["start"] = noisy(alphas_bar[0]), begin
    if inpaints:
        return Entry(x, options, scene.concat_conditioning(task, to_latents, factor))
    if puts_back:
        after = [*alphas_bar[1:], 1.0]
        options["post_step"] = lambda x, i: anew * x + (1 - anew) * noisy(after[i])
    return Entry(x, options)


def with_concat(predict: Predict, concat: Array) -> Predict:
    """Make a `predict` that concatenates `concat` to x, repeated to the length of the batch."""
    xp = array_module(concat)

    def predict_with_concat(x, t):
        copies = [concat] * (len(x) // len(concat))  # with guidance two, of one for all many
        return predict(xp.concatenate([x, xp.concatenate(copies)], axis=-1), t)

    return predict_with_concat
