"""The inputs of stage 2's U-Net: latents, and their conditioning by concatenation."""

from collections.abc import Callable

import numpy as np

from tinyldm.backend import Array, array_module, to_device
from tinyldm.data.dataset import Dataset
from tinyldm.data.images import in_channels
from tinyldm.nn.protocol import Params
from tinyldm.sampling.init_image import Scene
from tinyldm.sampling.tasks import takes_whole_image
from tinyldm.threads import map_batch
from tinyldm.training.networks import Models
from tinyldm.training.state import State

AT_ONCE = 16  # images a thread, when all are encoded between the stages


def all_gaussians(
    models: Models, params: Params, images: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Encode uint8 images → mean and standard deviation, or None, of their latents, on the host."""

    def part(x):
        mean, std = models.vae.latent_distribution(params, models.pixels(x))
        return mean if std is None else array_module(mean).concatenate([mean, std], axis=-1)

    both = map_batch(part, to_device(images, device), size=AT_ONCE)
    both = to_device(both, "cpu")
    if both.shape[-1] == models.vae.latent_channels:
        return both, None
    return np.split(both, 2, axis=-1)


def conditioning_arrays(
    state: State, models: Models, data: Dataset, device: str
) -> Callable[[np.ndarray, np.random.Generator], tuple[Array, ...]]:
    """Return `of(chosen, rng)` → the conditioning arrays of these images for the task, if any.

    Low-resolution images and maps are encoded here, once for all. For inpainting it returns masks,
    drawn anew for every batch, and the masked images in pixels: see `conditioner`.
    """
    task = state.config.task

    def mask_and_rest(chosen, rng):
        scene = Scene.example(task, data.images[chosen], None, rng)
        rest = in_channels(scene.rest(), state.config.image_channels)
        return to_device(scene.latent_mask(models.vae.factor), device), to_device(rest, device)

    if task == "inpainting":
        return mask_and_rest
    if not takes_whole_image(task):
        return lambda chosen, rng: ()
    scene = Scene.example(task, data.images, data.maps, None)
    latents = all_gaussians(models, state.first_stage, scene.images, device)[0]
    latents *= np.float32(state.scaling_factor)
    return lambda chosen, rng: (to_device(latents[chosen], device),)


def conditioner(state: State, models: Models) -> Callable[..., Array]:
    """Return the function from conditioning arrays to the channels concatenated to the U-Net input.

    This is part of the loss, so that all cores share the encoding that every step needs.
    """
    scale = np.float32(state.scaling_factor)

    def from_mask_and_rest(mask, rest):
        z, _ = models.vae.latent_distribution(state.first_stage, rest)
        return array_module(z).concatenate([mask, z * scale], axis=-1)

    return from_mask_and_rest if state.config.task == "inpainting" else lambda latents: latents
