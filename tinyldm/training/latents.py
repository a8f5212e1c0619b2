"""The pictures of stage 2, as what its U-Net learns from: latents, and what is seen beside them."""

from collections.abc import Callable

import numpy as np

from tinyldm.backend import Array, array_module, map_batch, to_device
from tinyldm.data.dataset import Dataset
from tinyldm.nn.protocol import Params
from tinyldm.pixels import in_channels
from tinyldm.scene import Scene
from tinyldm.tasks import sees_all
from tinyldm.training.stages import Models
from tinyldm.training.state import State

AT_ONCE = 16  # pictures a thread, when all become latents between the stages


def all_gaussians(
    models: Models, params: Params, images: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean and standard deviation, or None, of the latents of uint8 pictures, on the host."""

    def part(x):
        mean, std = models.gaussians(params, models.pixels(x))
        return mean if std is None else array_module(mean).concatenate([mean, std], axis=-1)

    both = map_batch(part, to_device(images, device), size=AT_ONCE)
    both = to_device(both, "cpu")
    if both.shape[-1] == models.vae.latent_channels:
        return both, None
    return np.split(both, 2, axis=-1)


def seen_beside(
    state: State, models: Models, data: Dataset, device: str
) -> Callable[[np.ndarray, np.random.Generator], tuple[Array, ...]]:
    """`seen(chosen, rng)` → what the task has the U-Net see of these pictures, if anything.

    A small picture or a map becomes latents here, once for all. What a hidden part leaves of a
    picture is encoded anew in every batch, as the mask is another.
    """
    task, first_stage = state.config.task, state.first_stage
    scale = np.float32(state.scaling_factor)

    def to_latents(pixels):
        def part(x):
            x = in_channels(x, state.config.picture_channels)
            return models.gaussians(first_stage, x)[0] * scale

        return map_batch(part, to_device(pixels, device))

    def rest_and_mask(chosen, rng):
        scene = Scene.example(task, data.images[chosen], None, rng)
        return (scene.beside(task, to_latents, models.vae.factor),)

    if task == "inpainting":
        return rest_and_mask
    if not sees_all(task):
        return lambda chosen, rng: ()
    scene = Scene.example(task, data.images, data.maps, None)
    latents = all_gaussians(models, first_stage, scene.pictures, device)[0] * scale
    return lambda chosen, rng: (to_device(latents[chosen], device),)
