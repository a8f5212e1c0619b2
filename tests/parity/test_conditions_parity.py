"""Runs with tasks, classes, grey or oblong images: diffusers loads their components unchanged."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from parity_run import CONFIG, PROMPTS, STEPS, trained_and_moved
from PIL import Image

from tinyldm.data.shapes import make_shapes
from tinyldm.evaluation.reader import box_around
from tinyldm.sampling.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
KINDS = {
    "inpainting": {"task": "inpainting"},
    "upscaling": {"task": "upscaling-4"},
    "token": {"condition": "class-token"},
    "time": {"condition": "class-time"},
    "grey": {"grey": True, "side": (16, 32), "condition": "none"},
}


@pytest.fixture(scope="module")
def oblong(tmp_path_factory):
    """A folder of images that are twice as wide as high."""
    folder = tmp_path_factory.mktemp("images")
    images, _ = make_shapes(8, 32, 0)
    for i, image in enumerate(images):
        Image.fromarray(image[8:24]).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, oblong):
    """(kind, folder) of a short run."""
    folder = tmp_path_factory.mktemp("conditions") / request.param
    config = dataclasses.replace(
        CONFIG, data=str(oblong) if request.param == "grey" else "shapes", **KINDS[request.param]
    )
    return request.param, trained_and_moved(folder, config)


def torched(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy()) if x.ndim == 4 else torch.from_numpy(x)


def test_the_u_net_is_diffusers_own(run):
    kind, folder = run
    pipeline = Pipeline.load(folder)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    c = pipeline.unet.config
    h, w = pipeline.size[0] // 2, pipeline.size[1] // 2
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, h, w, c.in_channels), dtype=np.float32)
    t = np.array([10, 900])
    condition = pipeline.embed({"grey": ["", ""]}.get(kind, ["circle", "square"]))
    expected = theirs(
        torched(x),
        torch.from_numpy(t),
        None if kind == "time" else torched(condition),
        class_labels=torched(condition) if kind == "time" else None,
    ).sample
    found = pipeline.predict(x, t, condition)
    np.testing.assert_allclose(
        np.moveaxis(found, -1, 1), expected.detach().numpy(), rtol=0, atol=2e-5
    )


def test_the_autoencoder_is_diffusers_own(run):
    kind, folder = run
    pipeline = Pipeline.load(folder)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    z = np.random.default_rng(2).standard_normal((1, 8, 8, 4), dtype=np.float32)
    scale = pipeline.vae.config.scaling_factor
    expected = theirs.decode(torched(z / np.float32(scale))).sample.detach().numpy()
    assert expected.shape[1] == (1 if kind == "grey" else 3)
    levels = np.clip(np.round((np.moveaxis(expected, 1, -1) + 1) * 127.5), 0, 255)
    assert abs(pipeline.decode(z) - levels).max() <= 1


@pytest.mark.parametrize("run", ["inpainting"], indirect=True)
def test_a_run_that_inpaints_is_a_pipeline_of_diffusers(run, monkeypatch):
    """Both generate the same image from the same latents, and encode the init image to means."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    _, folder = run
    ours = Pipeline.load(folder)
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    (pixels,), _ = make_shapes(1, 16, 4)
    image, mask = Image.fromarray(pixels), Image.fromarray(255 * np.uint8(box_around(pixels, 2)))
    latents = np.random.default_rng(3).standard_normal((1, 8, 8, 4), dtype=np.float32)
    options = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "output_type": "np"}
    expected = theirs(
        PROMPTS[0], image=image, mask_image=mask, latents=torched(latents), height=16, width=16,
        strength=1.0, **options,
    ).images  # fmt: skip
    (found,) = ours(
        PROMPTS[0], image=image, mask=mask, latents=latents, steps=STEPS, guidance=3.0, size=16
    )
    assert abs(np.asarray(found) / 255 - expected[0]).mean() < 1 / 255


@pytest.mark.parametrize("run", ["grey"], indirect=True)
def test_grey_and_oblong_is_a_pipeline_of_diffusers(run):
    _, folder = run
    ours = Pipeline.load(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(3).standard_normal((1, 8, 16, 4), dtype=np.float32)
    expected = theirs(
        "", latents=torched(latents), guidance_scale=1.0, num_inference_steps=STEPS, height=16,
        width=32, output_type="np",
    ).images  # fmt: skip
    (found,) = ours("", latents=latents, steps=STEPS)
    grey = np.asarray(found)[..., :1] / 255
    assert expected[0].shape[:2] == grey.shape[:2] == (16, 32)
    assert abs(grey - expected[0]).mean() < 1 / 255
