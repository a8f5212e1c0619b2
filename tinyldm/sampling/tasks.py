"""Tasks, which condition the U-Net on an image: conditioning by concatenation.

Rombach et al. 2022, sections 4.3.2 to 4.5: the image is encoded to latents, which become further
channels of the U-Net's input. The task says which image: a masked one, a smaller
one, or a layout map.
"""

import numpy as np
from PIL import Image

from tinyldm.config import ConfigError, unknown
from tinyldm.threads import map_threads

TASKS = ("generation", "inpainting", "upscaling-2", "upscaling-4", "layout")  # the first: no image
ALL_MASKED = 0.25  # share of masks that cover all, as in Stable Diffusion's inpainting model
RECTANGLES = 3  # at most, in the others


def concat_channels(task: str, latents: int) -> int:
    """Return the number of channels concatenated to the noisy latents."""
    return {"generation": 0, "inpainting": latents + 1}.get(task, latents)


def takes_whole_image(task: str) -> bool:
    """Return whether the model is conditioned on a whole image, smaller or as a map, not masked."""
    return task not in ("generation", "inpainting")


def times_larger(task: str) -> int:
    """Return the upscaling factor of a task, each side."""
    return int(task.removeprefix("upscaling-")) if task.startswith("upscaling") else 1


def task_of(channels: int, latents: int, said: str | None = None) -> str:
    """Return the task of a U-Net with so many input channels; `said`: what its folder says of it.

    ConfigError for a task that is not implemented.
    """
    if said is not None and said not in TASKS:
        raise ConfigError(f"model_index.json: task: {unknown(said, TASKS)}")
    by_channels = {latents: "generation", 2 * latents + 1: "inpainting"}
    task = by_channels.get(channels, said)
    if task is None or channels != latents + concat_channels(task, latents):
        raise ConfigError(
            f"unet config: in_channels = {channels} is not implemented with {latents} channels of "
            f"latents, only {latents}, or {2 * latents + 1} for inpainting"
        )
    return task


def stretched(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 (n, h, w, 3) → (n, height, width, 3), bicubic, smoothed where they shrink."""

    def one(image):
        size = (width, height)
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))

    return np.stack(map_threads(one, images))


def reduced(images: np.ndarray, times: int) -> np.ndarray:
    """Downsample images by `times`, each side; ValueError where that does not divide them."""
    h, w = images.shape[1:3]
    if h % times or w % times:
        raise ValueError(f"upscaling: expected sides that {times} divides, found {h}×{w}")
    return stretched(images, h // times, w // times)


def random_masks(rng: np.random.Generator, n: int, height: int, width: int) -> np.ndarray:
    """Draw masks, bool (n, height, width), True where masked: a few rectangles, or everything."""
    masks = np.zeros((n, height, width), bool)
    for mask in masks:
        if rng.random() < ALL_MASKED:
            mask[...] = True
            continue
        for _ in range(rng.integers(1, RECTANGLES + 1)):
            h, w = (rng.integers(side // 4, 3 * side // 4 + 1) for side in (height, width))
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            mask[top : top + h, left : left + w] = True
    return masks
