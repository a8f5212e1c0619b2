"""Whole images against diffusers: a folder of either side is loaded by the other, as it is."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
import transformers
from parity_run import CONFIG, PROMPTS, STEPS, trained_and_moved

from tinyldm.diffusion.schedule import Schedule
from tinyldm.models import Tokenizer
from tinyldm.sampling.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NEGATIVE = "a large green square"
torch.set_num_threads(1)  # the models are too small to share out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_and_moved(tmp_path_factory.mktemp("parity") / "run", CONFIG)


@pytest.fixture(scope="module")
def written_by_diffusers(trained, tmp_path_factory):
    """A small random pipeline of the make of Stable Diffusion 1, in diffusers' own handwriting."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=32,
    )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(trained / "tokenizer")
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    for module in (unet, vae, text):
        with torch.no_grad():
            for w in module.parameters():
                w += 0.05 * torch.randn_like(w)
    folder = tmp_path_factory.mktemp("diffusers") / "model"
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["trained", "written_by_diffusers"])
def pair(request):
    """One folder, read by both."""
    folder = request.getfixturevalue(request.param)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    return Pipeline.load(folder), theirs


def start_noise(pipeline, n):
    height, width = (size // pipeline.vae.factor for size in pipeline.size)
    return np.random.default_rng(n).standard_normal((n, height, width, 4), dtype=np.float32)


def generate(theirs, prompts, guidance, negative, noise, output, steps=STEPS):
    return theirs(
        prompts,
        negative_prompt=[negative] * len(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        output_type=output,
    ).images


@pytest.mark.parametrize(
    ("prompts", "guidance", "negative"),
    [
        (PROMPTS[:1], 1.0, ""),
        (PROMPTS, 1.0, ""),
        (PROMPTS, 3.0, ""),
        (PROMPTS[:1], 7.5, NEGATIVE),
        (PROMPTS, 2.5, NEGATIVE),
    ],
)
def test_images_are_those_of_diffusers(pair, prompts, guidance, negative, capsys):
    ours, theirs = pair
    noise = start_noise(ours, len(prompts))
    expected = generate(theirs, prompts, guidance, negative, noise, "np")
    *_, (x, _) = ours.denoise(
        ours.sampling_params(prompts, negative, steps=STEPS, guidance=guidance), noise
    )
    pixels = np.clip(ours.vae.from_latents(ours.params["vae"], x)[0] / 2 + 0.5, 0, 1)
    assert pixels.shape == expected.shape
    assert expected.std() > 0.05, "a plain image would prove nothing"
    difference = abs(pixels - expected).mean()

    options = {"negative_prompt": negative, "steps": STEPS, "guidance": guidance}
    images = ours(prompts, latents=noise, **options)
    levels = np.stack([np.asarray(image, int) for image in images])
    levels = abs(levels - np.round(255 * expected))
    with capsys.disabled():
        print(
            f"\n{len(prompts)} prompts, guidance {guidance}, negative {negative!r}: mean difference"
            f" {difference:.1e} of the range 0…1; {levels.max():.0f} levels of 255 at most, in "
            f"{(levels > 0).mean():.2%} of the values"
        )
    assert difference < 1e-5  # far below one level, 1/255
    assert levels.max() <= 1 and (levels > 0).mean() < 0.01


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_latents_are_those_of_diffusers(pair, guidance):
    ours, theirs = pair
    noise = start_noise(ours, 2)
    *_, (x, _) = ours.denoise(
        ours.sampling_params(PROMPTS, NEGATIVE, steps=STEPS, guidance=guidance), noise
    )
    expected = generate(theirs, PROMPTS, guidance, NEGATIVE, noise, "latent")
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert expected.std() > 0.1
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-5 * abs(expected).max())


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("pndm", diffusers.PNDMScheduler),
        ("euler", diffusers.EulerDiscreteScheduler),
        ("heun", diffusers.HeunDiscreteScheduler),
        ("dpm++2m", diffusers.DPMSolverMultistepScheduler),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_latents_of_other_samplers_are_those_of_their_schedulers(pair, sampler, scheduler):
    """Each made from the folder's own config; those that draw noise draw it elsewhere."""
    ours, theirs = pair
    noise = start_noise(ours, 2)
    steps = 10  # 1000 // 8 is odd: test_solver_parity.py says what PNDM makes of it
    recipe = ours.sampling_params(PROMPTS, NEGATIVE, steps=steps, guidance=3.0, sampler=sampler)
    *_, (x, _) = ours.denoise(recipe, noise)
    before = theirs.scheduler
    theirs.scheduler = scheduler.from_config(before.config)
    try:
        expected = generate(theirs, PROMPTS, 3.0, NEGATIVE, noise, "latent", steps)
    finally:
        theirs.scheduler = before
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert expected.std() > 0.1
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-4 * abs(expected).max())


def test_an_image_that_is_not_square(pair):
    ours, theirs = pair
    height, width = 16, 40  # diffusers wants multiples of 8
    shape = (1, height // ours.vae.factor, width // ours.vae.factor, 4)
    noise = np.random.default_rng(3).standard_normal(shape, dtype=np.float32)
    *_, (x, _) = ours.denoise(
        ours.sampling_params(PROMPTS[0], steps=4, guidance=2.0, size=(height, width)), noise
    )
    expected = theirs(
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=2.0,
        height=height,
        width=width,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        output_type="latent",
    ).images.numpy()
    expected = expected.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-5 * abs(expected).max())


def test_token_ids_and_hidden_states_are_those_of_transformers(pair):
    ours, theirs = pair
    texts = [*PROMPTS, NEGATIVE, "", "it's the 3rd café!"]
    expected = theirs.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert ours.tokenizer(texts).tolist() == expected.input_ids.tolist()
    mask = theirs.text_encoder(expected.input_ids)[0].detach().numpy()
    assert abs(mask).max() > 0.5
    np.testing.assert_allclose(ours.embed(texts), mask, rtol=0, atol=1e-5)


def test_what_diffusers_reads_is_what_the_file_says(trained):
    """Nothing fell back to a default on the way: sizes, marks, scale, schedule."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(trained, local_files_only=True)
    ours = Pipeline.load(trained)
    assert type(theirs.scheduler) is diffusers.DDIMScheduler
    assert theirs.safety_checker is None
    assert theirs.vae.config.scaling_factor == ours.vae.config.scaling_factor != 1
    assert theirs.unet.config.sample_size * ours.vae.factor == ours.size[0] == CONFIG.side
    assert theirs.tokenizer.model_max_length == ours.tokenizer.max_length == CONFIG.tokens
    assert theirs.text_encoder.config.eos_token_id == ours.tokenizer.end_id
    schedule = Schedule(ours.configs["scheduler"])
    np.testing.assert_allclose(schedule.alphas_bar, theirs.scheduler.alphas_cumprod, rtol=1e-5)


def test_what_diffusers_writes_again_is_read_the_same(trained, tmp_path):
    """Through their save_pretrained and back: not one weight changes."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(trained, local_files_only=True)
    theirs.save_pretrained(tmp_path)
    before, after = Pipeline.load(trained), Pipeline.load(tmp_path)
    for component, params in before.params.items():
        assert params.keys() == after.params[component].keys()
        for name, w in params.items():
            np.testing.assert_array_equal(w, after.params[component][name], err_msg=name)
    assert isinstance(after.tokenizer, Tokenizer)
    assert after.tokenizer.vocab == before.tokenizer.vocab
    assert after.tokenizer.merges == before.tokenizer.merges
    assert after.tokenizer.max_length == before.tokenizer.max_length


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_sample": True},
        {"clip_sample": None},  # left out: True by default
        {"steps_offset": 0},
        {"steps_offset": None},  # left out: 0 by default
        {"steps_offset": 3, "clip_sample": True, "clip_sample_range": 0.5},
        {"_class_name": "PNDMScheduler", "steps_offset": 0},
        {"_class_name": "DDPMScheduler", "clip_sample": True, "steps_offset": 7},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 0},
        {"set_alpha_to_one": True},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": 0},
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_diffusers_repairs_on_loading(written_by_diffusers, tmp_path, changes):
    folder = shutil.copytree(written_by_diffusers, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    config = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None}
    file.write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    ours = Pipeline.load(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    noise = start_noise(ours, 2)
    sampler = "ddim" if config["_class_name"] == "DDPMScheduler" else None  # without its noise
    if sampler:
        theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    recipe = ours.sampling_params(PROMPTS, NEGATIVE, steps=10, guidance=3.0, sampler=sampler)
    *_, (x, _) = ours.denoise(recipe, noise)
    expected = generate(theirs, PROMPTS, 3.0, NEGATIVE, noise, "latent", 10)
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert abs(expected).max() > 1.5, "clipping would not show"
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize(
    ("version", "size", "expected"),
    [("0.6.0", 8, 64), ("0.8.1", 32, 64), ("0.9.0", 8, 8), ("0.10.2", 8, 8), ("0.6.0", 96, 96)],
)
def test_the_size_of_old_unets(written_by_diffusers, tmp_path, version, size, expected):
    folder = shutil.copytree(written_by_diffusers, tmp_path / "model")
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text()) | {"_diffusers_version": version, "sample_size": size}
    file.write_text(json.dumps(config))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    ours = Pipeline.load(folder)
    assert theirs.unet.config.sample_size == expected
    assert ours.size == (expected * ours.vae.factor,) * 2
    ours.save(tmp_path / "again")
    assert Pipeline.load(tmp_path / "again").size == ours.size
