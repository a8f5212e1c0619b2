"""What a task gives of pictures whose truth is known, and what a model makes of that."""

import numpy as np

from tinyldm.backend import Array
from tinyldm.data.dataset import Dataset
from tinyldm.data.shapes import LANCZOS_REACH
from tinyldm.evaluation.reader import box_around
from tinyldm.evaluation.statistics import psnr, ssim
from tinyldm.sampling.init_image import Scene
from tinyldm.sampling.pipeline import Pipeline

SEED = 20_260_102  # of the hidden parts
AROUND = LANCZOS_REACH + 1  # pixels around a shape, so that none that it changed is seen
GREY = 128  # a hidden part, where it is shown


def given(task: str, data: Dataset, shapes: bool = False) -> Scene | None:
    """The same for the same pictures, always; None for generation, which is given nothing.

    shapes: hide just what is drawn on the ground, and what its outline reaches.
    """
    if task == "generation":
        return None
    if task == "inpainting" and shapes:
        hidden = np.stack([box_around(picture, AROUND) for picture in data.images])
        return Scene(data.images, hidden)
    return Scene.example(task, data.images, data.maps, np.random.default_rng(SEED))


def seen_beside(pipeline: Pipeline, data: Dataset) -> Array | None:
    """What the U-Net sees of these pictures beside their noisy latents, if anything."""
    scene = given(pipeline.task, data)
    return scene and scene.beside(pipeline.task, pipeline.to_latents, pipeline.vae.factor)


def paint(
    pipeline: Pipeline, prompts: list[str], scene: Scene | None = None, **options: object
) -> np.ndarray:
    """Generate one image a prompt, uint8 (n, h, w, 3), in the size of the scene."""
    size = scene and scene.pictures.shape[1:3]
    for x, _ in pipeline.denoise(
        pipeline.sampling_params(prompts, size=size, **options), None, scene
    ):
        latents = x
    return pipeline.decode(latents)


def as_shown(scene: Scene) -> np.ndarray:
    """The pictures of a scene, grey where they are hidden."""
    if scene.hidden is None:
        return scene.pictures
    return np.where(scene.hidden[..., None], np.uint8(GREY), scene.pictures)


def compare(scene: Scene, painted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How near the painted pictures are to the true ones, beside what was given to begin with.

    Of inpainting it is the part that was not hidden, which should stay.
    """
    if scene.hidden is not None:
        seen = ~scene.hidden[..., None]
        return {"psnr_seen": psnr(painted * seen, truth * seen)}
    return {
        "psnr": psnr(painted, truth),
        "ssim": ssim(painted, truth),
        "psnr_given": psnr(scene.pictures, truth),
        "ssim_given": ssim(scene.pictures, truth),
    }
