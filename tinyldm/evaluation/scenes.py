"""Task inputs made from images with known ground truth, and how near the results come to it."""

import numpy as np

from tinyldm.backend import Array
from tinyldm.data.dataset import Dataset
from tinyldm.data.shapes import LANCZOS_REACH
from tinyldm.evaluation.reader import box_around
from tinyldm.evaluation.statistics import mean_and_error, psnr, ssim
from tinyldm.sampling.init_image import Scene
from tinyldm.sampling.pipeline import Pipeline

SEED = 20_260_102  # of the masks
AROUND = LANCZOS_REACH + 1  # pixels around a shape, so that the mask covers all that it changed
GREY = 128  # a masked part, in figures


def task_input(task: str, data: Dataset, shapes: bool = False) -> Scene | None:
    """Make the input of a task from these images, always the same; None for generation.

    shapes: mask just what is drawn on the ground, and what its outline reaches.
    """
    if task == "generation":
        return None
    if task == "inpainting" and shapes:
        mask = np.stack([box_around(image, AROUND) for image in data.images])
        return Scene(data.images, mask)
    return Scene.example(task, data.images, data.maps, np.random.default_rng(SEED))


def concat_conditioning(pipeline: Pipeline, data: Dataset) -> Array | None:
    """Return the concatenation conditioning of the U-Net for these images, if any."""
    scene = task_input(pipeline.task, data)
    return scene and scene.concat_conditioning(
        pipeline.task, pipeline.to_latents, pipeline.vae.factor
    )


def generate(
    pipeline: Pipeline, prompts: list[str], scene: Scene | None = None, **options: object
) -> np.ndarray:
    """Generate one image per prompt, uint8 (n, h, w, 3), in the size of the scene."""
    size = scene and scene.images.shape[1:3]
    for x, _ in pipeline.denoise(
        pipeline.sampling_params(prompts, size=size, **options), None, scene
    ):
        latents = x
    return pipeline.decode(latents)


def masked_images(scene: Scene) -> np.ndarray:
    """Return the images of a scene, grey where they are masked."""
    if scene.mask is None:
        return scene.images
    return np.where(scene.mask[..., None], np.uint8(GREY), scene.images)


def compare(
    scene: Scene, generated: np.ndarray, truth: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Compare generated images with the ground truth, and the input with it as a baseline.

    → {name: (mean over images, its standard error)}. For inpainting it compares the unmasked part,
    which should stay, where there is one.
    """
    if scene.mask is not None:
        seen = ~scene.mask[..., None]
        share = seen.mean(axis=(1, 2, 3))
        some = share > 0
        if not some.any():
            return {}
        # Masked pixels are 0 on both sides, so the mean over all of them is by `share` too small.
        of_all = psnr((generated * seen)[some], (truth * seen)[some])
        return {"psnr_seen": mean_and_error(of_all + 10 * np.log10(share[some]))}
    return {
        "psnr": mean_and_error(psnr(generated, truth)),
        "ssim": mean_and_error(ssim(generated, truth)),
        "psnr_given": mean_and_error(psnr(scene.images, truth)),
        "ssim_given": mean_and_error(ssim(scene.images, truth)),
    }
