"""Image to image, inpainting and guidance rescale against diffusers' pipelines, on narrow models.

The same folder, noise, image and mask on both sides. Where diffusers draws from the encoder's
Gaussian it is made to take the mean, as ours does.
"""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion import (
    pipeline_stable_diffusion_img2img,
    pipeline_stable_diffusion_inpaint,
)
from original_layout import random_model
from PIL import Image, ImageDraw

from tinyldm.models import Tokenizer
from tinyldm.sampling.init_image import Scene
from tinyldm.sampling.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PROMPTS = ["a red boat on a lake", "two cats"]
NEGATIVE = "blurry"
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
}
HEIGHT, WIDTH = 64, 96
FOLDERS = {"1.5": (1, 4), "2.1": (2, 4), "1.5 inpainting": (1, 9)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, architecture in FOLDERS.items():
        configs, pad, params = random_model(*architecture)
        if name == "2.1":
            configs["scheduler"]["prediction_type"] = "v_prediction"
        made[name] = tmp_path_factory.mktemp("tasks") / "model"
        Pipeline(configs, params, Tokenizer.clip(pad)).save(made[name])
    return made


@pytest.fixture
def init_image():
    x = np.linspace(0, 255, 128 * 200 * 3).reshape(128, 200, 3) * [1, 0.7, 0.4]
    image = Image.fromarray(x.astype(np.uint8))
    ImageDraw.Draw(image).ellipse((30, 20, 120, 90), fill=(230, 60, 20))
    return image


@pytest.fixture
def mask():
    image = Image.new("L", (200, 128), 0)
    ImageDraw.Draw(image).polygon([(20, 10), (150, 30), (90, 120)], fill=255)
    return image


@pytest.fixture
def noise(monkeypatch):
    """Unit normal noise in our layout, which diffusers is given wherever it would draw some."""
    drawn = np.random.default_rng(1).standard_normal((2, HEIGHT // 8, WIDTH // 8, 4), np.float32)

    def same(shape, **options):
        theirs = torch.tensor(drawn.transpose(0, 3, 1, 2))
        assert tuple(shape) == tuple(theirs.shape)
        return theirs

    for module in (pipeline_stable_diffusion_img2img, pipeline_stable_diffusion_inpaint):
        monkeypatch.setattr(module, "randn_tensor", same)
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    return drawn


def diffusers_pipeline(kind, folder, sampler):
    pipe = kind.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    return pipe


def assert_same_image(ours, recipe, latents, scene, expected):
    *_, (x, _) = ours.denoise(recipe, latents, scene)
    pixels = np.clip(ours.vae.from_latents(ours.params["vae"], x)[0] / 2 + 0.5, 0, 1)
    assert pixels.shape == expected.shape and expected.std() > 0.05
    assert abs(pixels - expected).mean() < 1e-4  # 1/255 would be allowed


COMMON = {"negative_prompt": [NEGATIVE] * 2, "output_type": "np", "guidance_scale": 3.0}


@pytest.mark.parametrize("sampler", [name for name in SCHEDULERS if name != "pndm"])
@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("name", ["1.5", "2.1"])
def test_image_to_image(folders, name, init_image, noise, sampler, strength):
    ours = Pipeline.load(folders[name])
    recipe = ours.sampling_params(
        PROMPTS,
        NEGATIVE,
        (HEIGHT, WIDTH),
        steps=10,
        guidance=3.0,
        sampler=sampler,
        strength=strength,
    )
    scene = Scene.of(init_image, None, recipe)
    theirs = diffusers_pipeline(diffusers.StableDiffusionImg2ImgPipeline, folders[name], sampler)
    resized = init_image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    expected = theirs(
        PROMPTS, image=resized, strength=strength, num_inference_steps=10, **COMMON
    ).images
    assert_same_image(ours, recipe, noise, scene, expected)


def test_image_to_image_by_pndm(folders, init_image, noise):
    """All the way it is the same. Otherwise theirs begins within its list of time steps.

    There the second stands twice, as its step is made twice. Cut behind that, the list begins a
    step early, and the second step, made twice all the same, leaves x a step behind what the
    network is told from then on. Ours begins where the other samplers do, as at the list's start.
    """
    ours = Pipeline.load(folders["1.5"])
    theirs = diffusers_pipeline(diffusers.StableDiffusionImg2ImgPipeline, folders["1.5"], "pndm")
    resized = init_image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)

    def both(strength):
        recipe = ours.sampling_params(
            PROMPTS,
            NEGATIVE,
            (HEIGHT, WIDTH),
            steps=10,
            guidance=3.0,
            sampler="pndm",
            strength=strength,
        )
        options = {"strength": strength, "num_inference_steps": 10, **COMMON}
        expected = theirs(PROMPTS, image=resized, **options).images
        return recipe, noise, Scene.of(init_image, None, recipe), expected

    assert_same_image(ours, *both(1.0))
    asked = []
    real = theirs.unet.forward
    theirs.unet.forward = lambda x, t, *rest, **options: (
        asked.append(int(t)) or real(x, t, *rest, **options)
    )
    both(0.6)
    assert asked == [601, 501, 401, 301, 201, 101, 1]  # six of 901, 801, … 1 would begin with 501


@pytest.mark.parametrize("sampler", [name for name in SCHEDULERS if name not in ("heun", "pndm")])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", FOLDERS)
def test_inpainting(folders, name, init_image, mask, noise, sampler, strength):
    """With the model of nine channels, and with those of four by keeping the known part."""
    ours = Pipeline.load(folders[name])
    recipe = ours.sampling_params(
        PROMPTS,
        NEGATIVE,
        (HEIGHT, WIDTH),
        steps=10,
        guidance=3.0,
        sampler=sampler,
        strength=strength,
    )
    scene = Scene.of(init_image, mask, recipe)
    theirs = diffusers_pipeline(diffusers.StableDiffusionInpaintPipeline, folders[name], sampler)
    expected = theirs(
        PROMPTS,
        image=init_image,
        mask_image=mask,
        strength=strength,
        num_inference_steps=10,
        height=HEIGHT,
        width=WIDTH,
        **COMMON,
    ).images
    assert_same_image(ours, recipe, noise, scene, expected)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
@pytest.mark.parametrize("name", ["1.5", "2.1"])
def test_guidance_rescale(folders, name, noise, rescale):
    ours = Pipeline.load(folders[name])
    recipe = ours.sampling_params(
        PROMPTS, NEGATIVE, (HEIGHT, WIDTH), steps=10, guidance=3.0, sampler="ddim", rescale=rescale
    )
    theirs = diffusers_pipeline(diffusers.StableDiffusionPipeline, folders[name], "ddim")
    expected = theirs(
        PROMPTS,
        guidance_rescale=rescale,
        num_inference_steps=10,
        height=HEIGHT,
        width=WIDTH,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        **COMMON,
    ).images
    assert_same_image(ours, recipe, noise, None, expected)
