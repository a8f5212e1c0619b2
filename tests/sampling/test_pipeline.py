"""Text to image with a small random model: what decides the bytes, and the folder it lives in."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slow import mostly_slow
from small_model import PROMPTS, STEPS, generate, make_pipeline, start_noise

from tinyldm.checkpoints.components import COMPONENTS
from tinyldm.checkpoints.diffusers_folder import CHECKSUMS, Unfinished
from tinyldm.checkpoints.safetensors import WeightsError, load_weights, save_weights
from tinyldm.config import ConfigError
from tinyldm.data.images import from_uint8, to_uint8
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.kernels import shared_steps
from tinyldm.sampling.metadata import fingerprint
from tinyldm.sampling.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*edited since the model was written")
COMPONENT_FILES = [  # in the order of writing; the index is the last
    *(f"{name}/{file}" for name, (_, _, weights) in COMPONENTS.items()
      for file in ("config.json", weights)),
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
]  # fmt: skip


@pytest.fixture(scope="session")
def pipe():
    return make_pipeline()


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save(tmp_path / "model")
    return tmp_path / "model"


def assert_close(found, expected):
    """At most one level in less than 1 % of the values, which is what rounding may do."""
    levels = abs(found.astype(int) - expected)
    assert levels.max() <= 1 and (levels > 0).mean() < 0.01


def one_line(caught):
    text = str(caught.value)
    assert text and "\n" not in text
    return text


SCHEDULERS = {}  # diffusers' class → our sampler, the first of several
for _name, _sampler in SAMPLERS.items():
    SCHEDULERS.setdefault(_sampler.scheduler, _name)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_folder_is_generated_from_by_the_scheduler_that_it_names(pipe, folder, name):
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text()) | {"_class_name": name}
    file.write_text(json.dumps(settings))
    index = json.loads((folder / "model_index.json").read_text())
    del index["_tinyldm"]
    index["scheduler"][1] = name
    (folder / "model_index.json").write_text(json.dumps(index))
    loaded = Pipeline.load(folder)
    assert loaded.defaults["sampler"] == SCHEDULERS[name]
    expected = generate(pipe, PROMPTS[:1], sampler=SCHEDULERS[name], steps=3, guidance=2)
    np.testing.assert_array_equal(generate(loaded, PROMPTS[:1], steps=3, guidance=2), expected)


def test_the_stochastic_solver_is_told_by_its_algorithm(pipe):
    configs = pipe.configs | {
        "scheduler": pipe.configs["scheduler"]
        | {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    }
    assert Pipeline(configs, pipe.params, pipe.tokenizer).defaults["sampler"] == "dpm++2m_sde"


# ------------------------------------------------------------------------------- noise and batches


def test_a_prompt_gives_a_list_of_images(pipe):
    (image,) = pipe(PROMPTS[0])
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert np.asarray(image).std() > 10
    images = pipe(PROMPTS)
    assert isinstance(images, list) and len(images) == len(PROMPTS)
    assert pipe(tuple(PROMPTS[:1])) == [image] == pipe(PROMPTS[:1])


@pytest.mark.parametrize("sampler", mostly_slow(SAMPLERS, "ddim", "dpm++2m_sde"))
def test_the_same_call_gives_the_same_bytes(pipe, sampler):
    options = {"sampler": sampler, "seed": 5}
    one, other = (generate(pipe, PROMPTS[:3], **options) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert (one != generate(pipe, PROMPTS[:3], sampler=sampler, seed=6)).mean() > 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("n", mostly_slow([1, 2, 4], 2))
def test_an_image_does_not_depend_on_its_company(pipe, sampler, n):
    alone = generate(pipe, PROMPTS[:n], sampler=sampler, seed=3)
    together = generate(pipe, PROMPTS, sampler=sampler, seed=3)
    assert_close(alone, together[:n])
    assert len({image.tobytes() for image in together}) == len(PROMPTS)


@pytest.mark.parametrize("processes", mostly_slow(["", "1", "2", "3"], "", "2"))
@pytest.mark.parametrize("n, at_once", [(1, 64), (2, 64), (7, 1), (7, 2), (7, 64)])
def test_steps_with_a_fixed_context_predict_what_single_calls_do(
    pipe, monkeypatch, processes, n, at_once
):
    monkeypatch.setenv("TINYLDM_PROCESSES", processes)
    context = pipe.embed([PROMPTS[i % 5] for i in range(n)])
    with pipe.predictor(context, at_once) as predict:
        for t in (900, 3):
            x = start_noise(n, seed=t)
            np.testing.assert_allclose(predict(x, t), pipe.predict(x, t, context), atol=1e-5)


def test_what_depends_on_the_context_alone_is_made_once(pipe, monkeypatch, with_kernels):
    """Then weights that change there change nothing, and elsewhere they do."""
    monkeypatch.setenv("TINYLDM_PROCESSES", "1")
    params = {name: w.copy() for name, w in pipe.params["unet"].items()}
    monkeypatch.setitem(pipe.params, "unet", params)
    x = start_noise(2)
    with pipe.predictor(pipe.embed(PROMPTS[:2])) as predict:
        before = predict(x, 5)
        once = [n for n in params if "attn2.to_k" in n or "attn2.to_v" in n or "add_emb" in n]
        assert len(once) > 10
        for name in once:
            params[name] += 1
        np.testing.assert_array_equal(predict(x, 5), before)
        for name in ("conv_in.weight", "mid_block.attentions.0.proj_in.weight", "conv_out.bias"):
            params[name] = params[name] + 0.1
            after = predict(x, 5)
            assert not np.array_equal(after, before), name
            before = after


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_start_noise_is_that_of_seed_and_index(pipe, monkeypatch, sampler, n):
    """To the bit, for any batch: seen where the sampler is called."""
    seen = []

    def spy(predict, schedule, x, steps, **options):
        seen.append(x.copy())
        return iter([(x, x)])

    spying = dataclasses.replace(SAMPLERS[sampler], function=spy)
    monkeypatch.setitem(SAMPLERS, sampler, spying)
    list(pipe.denoise(pipe.sampling_params(PROMPTS[:n], seed=9, sampler=sampler)))
    assert seen[0].dtype == np.float32
    np.testing.assert_array_equal(seen[0], start_noise(n, 9))


@pytest.mark.parametrize("sampler", mostly_slow(SAMPLERS, "ddim", "heun"))
def test_given_latents_replace_the_start_noise_and_nothing_else(pipe, sampler):
    """Noise on the way is not that of the start again: the stream goes on behind it."""
    usual = generate(pipe, PROMPTS[:2], sampler=sampler, seed=4)
    latents = start_noise(2, 4)
    before = latents.copy()
    np.testing.assert_array_equal(
        generate(pipe, PROMPTS[:2], sampler=sampler, seed=4, latents=latents), usual
    )
    np.testing.assert_array_equal(latents, before)
    as_float64 = generate(
        pipe, PROMPTS[:2], sampler=sampler, seed=4, latents=latents.astype(np.float64)
    )
    np.testing.assert_array_equal(as_float64, usual)
    other = generate(pipe, PROMPTS[:2], sampler=sampler, seed=4, latents=-latents)
    assert (other != usual).mean() > 0.5


# ---------------------------------------------------------------------------- prompts and guidance


def test_negative_prompts(pipe):
    usual = generate(pipe, PROMPTS[:2])
    np.testing.assert_array_equal(generate(pipe, PROMPTS[:2], negative_prompt=""), usual)
    for_all = generate(pipe, PROMPTS[:2], negative_prompt="a blue square")
    each = generate(pipe, PROMPTS[:2], negative_prompt=["a blue square"] * 2)
    np.testing.assert_array_equal(for_all, each)
    mixed = generate(pipe, PROMPTS[:2], negative_prompt=["", "a blue square"])
    np.testing.assert_array_equal(mixed[0], usual[0])
    np.testing.assert_array_equal(mixed[1], for_all[1])
    assert (for_all[0] != usual[0]).any()


def test_leading_away_from_the_prompt_itself_is_no_guidance(pipe):
    """without + g (with − without), where both are the same prediction."""
    plain = generate(pipe, PROMPTS[:2], guidance=1)
    same = generate(pipe, PROMPTS[:2], negative_prompt=PROMPTS[:2], guidance=5.0)
    assert_close(same, plain)


def test_guidance_zero_is_the_negative_prompt(pipe):
    found = generate(pipe, PROMPTS[0], negative_prompt=PROMPTS[1], guidance=0)
    assert_close(found, generate(pipe, PROMPTS[1], guidance=1))


@pytest.mark.parametrize(("guidance", "contexts"), [(1, 2), (1.0, 2), (1.5, 4), (0, 4), (-1, 4)])
def test_without_guidance_nothing_is_computed_for_it(pipe, monkeypatch, guidance, contexts):
    """At guidance 1 neither U-Net nor text encoder sees the null context; else both halves run."""
    seen, texts = [], []
    unet, embed = pipe.unet, pipe.embed
    monkeypatch.setattr(shared_steps, "available", lambda: 1)  # else others would see them
    monkeypatch.setattr(shared_steps, "cores", lambda: 1)

    def spy(params, x, t, context):
        seen.append((x, context))
        return unet(params, x, t, context)

    monkeypatch.setattr(pipe, "unet", spy)
    monkeypatch.setattr(pipe.unet, "config", unet.config, raising=False)
    monkeypatch.setattr(pipe, "embed", lambda t: texts.append(list(t)) or embed(t))
    generate(pipe, PROMPTS[:2], guidance=guidance)
    assert [len(x) for x, _ in seen] == [contexts] * STEPS
    assert texts == [PROMPTS[:2]] + ([["", ""]] if contexts == 4 else [])
    for _, context in seen:
        np.testing.assert_array_equal(context[-2:], embed(PROMPTS[:2]))


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [([], ""), ((), ""), ("a", []), ("a", ["b", "c"]), (["a", "b"], ["c"]), (["a"], ())],
)
def test_numbers_of_prompts_that_do_not_fit(pipe, prompt, negative):
    with pytest.raises(ValueError, match="prompt: expected") as caught:
        pipe(prompt, negative_prompt=negative)
    one_line(caught)


# ------------------------------------------------------------------- steps, sampler, size, latents


def test_defaults_are_those_of_the_folder(pipe, folder, monkeypatch):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_tinyldm"] == {"steps": STEPS, "guidance": 2.0, "sampler": "ddim"}
    index["_tinyldm"] = {"steps": 2, "guidance": 1.5, "sampler": "ddpm"}
    (folder / "model_index.json").write_text(json.dumps(index))
    loaded = Pipeline.load(folder)
    assert loaded.defaults == index["_tinyldm"]
    np.testing.assert_array_equal(
        generate(loaded, PROMPTS[:2]),
        generate(pipe, PROMPTS[:2], steps=2, guidance=1.5, sampler="ddpm"),
    )
    # Each of them can be given, also as what would be the default elsewhere.
    np.testing.assert_array_equal(
        generate(loaded, PROMPTS[:2], steps=STEPS, guidance=2.0, sampler="ddim"),
        generate(pipe, PROMPTS[:2]),
    )


def test_defaults_of_a_folder_that_says_nothing_are_those_of_stable_diffusion(folder):
    index = json.loads((folder / "model_index.json").read_text())
    del index["_tinyldm"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert Pipeline.load(folder).defaults == {"steps": 50, "guidance": 7.5, "sampler": "ddim"}


def test_the_scheduler_of_the_folder_is_the_default_sampler(pipe):
    scheduler = pipe.configs["scheduler"] | {"_class_name": "DDPMScheduler"}
    other = Pipeline(pipe.configs | {"scheduler": scheduler}, pipe.params, pipe.tokenizer)
    assert other.defaults["sampler"] == "ddpm"


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_are_the_yields_of_denoise(pipe, steps):
    path = list(pipe.denoise(pipe.sampling_params(PROMPTS[:2], steps=steps, guidance=1)))
    assert len(path) == steps
    for x, x0 in path:
        assert x.shape == x0.shape == (2, 8, 8, 4)
        assert x.dtype == x0.dtype == np.float32
    np.testing.assert_array_equal(
        pipe.decode(path[-1][0]), generate(pipe, PROMPTS[:2], steps=steps, guidance=1)
    )


@pytest.mark.parametrize(
    ("size", "height", "width"), [(8, 8, 8), ((8, 20), 8, 20), ([24, 10], 24, 10), ((2, 2), 2, 2)]
)
def test_sizes(pipe, size, height, width):
    images = generate(pipe, PROMPTS[:2], size=size)
    assert images.shape == (2, height, width, 3)
    latents = start_noise(2, 0, (height // 2, width // 2, 4))
    np.testing.assert_array_equal(images, generate(pipe, PROMPTS[:2], size=size, latents=latents))


def test_the_size_trained_on(pipe):
    assert pipe.size == (16, 16)
    np.testing.assert_array_equal(generate(pipe, PROMPTS[0]), generate(pipe, PROMPTS[0], size=16))
    configs = pipe.configs | {"unet": pipe.configs["unet"] | {"sample_size": [4, 6]}}
    assert Pipeline(configs, pipe.params, pipe.tokenizer).size == (8, 12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": "dimm"}, "sampler: expected ddpm, ddim, .*found 'dimm'; did you mean 'ddim'?"),
        ({"size": 15}, "size: expected .*multiples of 2, found 15"),
        ({"size": (16, 9)}, "size: expected .*multiples of 2, found .*16.*9"),
        ({"size": 0}, "size: expected .*found 0"),
        ({"size": -2}, "size: expected .*found -2"),
        ({"steps": 0}, "steps: expected 1…1000, found 0"),
        ({"steps": -1}, "steps: expected 1…1000, found -1"),
        ({"steps": 1001}, "steps: expected 1…1000, found 1001"),
        ({"latents": np.zeros((1, 8, 8, 3))}, r"latents: expected \(1, 8, 8, 4\), found"),
        ({"latents": np.zeros((2, 8, 8, 4))}, r"latents: expected \(1, 8, 8, 4\), found"),
        ({"latents": np.zeros((8, 8, 4))}, r"latents: expected \(1, 8, 8, 4\), found"),
        ({"latents": np.zeros((1, 8, 8, 4)), "size": 8}, r"latents: expected \(1, 4, 4, 4\)"),
        ({"size": (16, 16, 3)}, "size: expected .*found"),
        ({"size": (16,)}, "size: expected .*found"),
        ({"guidance": float("nan")}, "guidance: "),
        ({"guidance": float("inf")}, "guidance: "),
        ({"size": "64"}, "size: expected pixels, one or .*, found '64'"),
        ({"size": 16.0}, "size: expected pixels, one or .*, found 16.0"),
        ({"size": (16, None)}, "size: expected pixels, one or .*, found"),
        ({"size": {"height": 16}}, "size: expected pixels, one or .*, found"),
        ({"negative_prompt": ["a", None]}, "negative_prompt: expected a text .* None among 2"),
        ({"negative_prompt": 3}, "negative_prompt: expected a text or a list of texts, found 3"),
        ({"negative_prompt": b"dark"}, "negative_prompt: expected a text or a list of texts"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt: expected one, or 1, found 3"),
        ({"negative_prompt": []}, "negative_prompt: expected one, or 1, found 0"),
        ({"latents": "noise"}, r"latents: expected numbers \(1, 8, 8, 4\), found 'noise'"),
        ({"latents": [[1.0], [2.0, 3.0]]}, r"latents: expected numbers \(1, 8, 8, 4\)"),
        ({"latents": [0.5]}, r"latents: expected \(1, 8, 8, 4\), found \(1,\)"),
        ({"latents": start_noise(1) * 1j}, r"latents: expected numbers .*, found complex ones"),
        ({"latents": start_noise(1) * np.nan}, "latents: expected finite numbers"),
        ({"latents": start_noise(1) * np.float64(1e300)}, "latents: expected finite numbers"),
        ({"steps": "ten"}, "steps: expected an integer ≥ 1, found 'ten'"),
        ({"steps": 2.5}, "steps: expected an integer ≥ 1, found 2.5"),
        ({"seed": "0"}, "seed: expected an integer ≥ 0, found '0'"),
        ({"seed": 0.5}, "seed: expected an integer ≥ 0, found 0.5"),
        ({"guidance": "7.5"}, "guidance: expected a number -1000…1000, found '7.5'"),
        ({"sampler": 5}, "sampler: expected ddpm, .*found '5'"),
        ({"rescale": [0.7]}, "rescale: expected a number 0…1, found"),
        ({"tile": "512"}, "tile: expected an integer ≥ 0, found '512'"),
        ({"tile": 512.0}, "tile: expected an integer ≥ 0, found 512.0"),
        ({"step": 5}, "step: no such option; did you mean 'steps'"),
        ({"num_inference_steps": 5}, "num_inference_steps: no such option"),
        ({"prompts": "b"}, "prompts: no such option"),
        ({"image": "photo.png"}, "image: expected a PIL image, .*found 'photo.png'"),
        ({"image": 5}, "image: expected a PIL image, .*found 5"),
        ({"callback": 5}, "callback: expected a function, found 5"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_asked_wrongly(pipe, options, says):
    with pytest.raises(ValueError, match=f"^{says}") as caught:
        pipe(PROMPTS[0], **options)
    one_line(caught)


@pytest.mark.parametrize("prompt", [None, 5, b"a red circle", ["a", None], [5], object(), {1: 2}])
def test_a_prompt_is_text(pipe, prompt):
    with pytest.raises(ValueError, match="^prompt: expected a text or a list of texts, found"):
        pipe(prompt)


def test_what_is_as_good_as_what_is_asked_for(pipe):
    usual = generate(pipe, PROMPTS[:1])
    for options in ({"negative_prompt": None}, {"negative_prompt": [""]}, {"size": np.int64(16)}):
        np.testing.assert_array_equal(generate(pipe, PROMPTS[:1], **options), usual)
    np.testing.assert_array_equal(generate(pipe, iter(PROMPTS[:1])), usual)
    noise = start_noise(1, 2)
    with_array = generate(pipe, PROMPTS[:1], latents=noise)
    np.testing.assert_array_equal(generate(pipe, PROMPTS[:1], latents=noise.tolist()), with_array)


# ------------------------------------------------------------------------------- decode and encode


def test_levels_and_numbers():
    levels = np.arange(256, dtype=np.uint8)
    x = from_uint8(levels)
    assert (x.dtype, x.min(), x.max()) == (np.float32, -1, 1)
    np.testing.assert_array_equal(to_uint8(x), levels)
    # Rounded to the nearest level, and clipped whatever the size.
    half = 0.5 / 127.5
    x = np.array([-1 + 0.9 * half, -1 + 1.1 * half, 1 - 0.9 * half, 1 - 1.1 * half, -7, 7, 1e30])
    np.testing.assert_array_equal(to_uint8(x), [0, 1, 255, 254, 0, 255, 255])
    assert to_uint8(x).dtype == np.uint8


def test_decode_and_encode(pipe):
    latents = 3 * start_noise(3, 2)
    images = pipe.decode(latents)
    assert (images.shape, images.dtype) == ((3, 16, 16, 3), np.uint8)
    assert images.min() < 100 and images.max() > 150
    z = pipe.encode(images)
    assert (z.shape, z.dtype) == (latents.shape, np.float32)
    mean = pipe.vae.encode(pipe.params["vae"], from_uint8(images))[0][..., :4]
    np.testing.assert_allclose(z, mean * 0.8, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 2, found 15×16"):
        pipe.encode(images[:, 1:])


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        *(("encode", images, r"images: expected uint8 \(n, height, width, 3\), fo") for images in
          (None, [1], np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3)))),
        *(("decode", latents, r"latents: expected numbers \(n, h, w, c\), found ") for latents in
          (None, [[1.0]], np.zeros((8, 8, 4)), np.zeros((1, 8, 8, 4), int))),
        *(("embed", texts, "prompts: expected a text or a list of texts, found ") for texts in
          (None, 5, [None])),
    ],
)  # fmt: skip
def test_what_cannot_be_encoded_decoded_or_embedded(pipe, method, given, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        getattr(pipe, method)(given)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_image_of_weights_that_are_not_finite(pipe, component, value):
    params = {name: dict(named) for name, named in pipe.params.items()}
    name = {"unet": "conv_in.bias", "vae": "decoder.conv_in.bias",
            "text_encoder": "text_model.final_layer_norm.bias"}[component]  # fmt: skip
    params[component][name] = np.full_like(params[component][name], value)
    broken = Pipeline(pipe.configs, params, pipe.tokenizer, pipe.defaults)
    with pytest.raises(ValueError, match="not finite: the weights have diverged") as caught:
        broken(PROMPTS[0])
    one_line(caught)


# -------------------------------------------------------------------------------------- the folder


def test_saved_and_loaded_it_generates_the_same_bytes(pipe, folder):
    loaded = Pipeline.load(str(folder))
    for component, params in pipe.params.items():
        assert loaded.params[component].keys() == params.keys()
        for name, w in params.items():
            assert loaded.params[component][name].dtype == np.float32
            np.testing.assert_array_equal(loaded.params[component][name], w)
    np.testing.assert_array_equal(generate(loaded, PROMPTS), generate(pipe, PROMPTS))
    assert loaded.tokenizer.vocab == pipe.tokenizer.vocab
    assert loaded.defaults == pipe.defaults


def test_the_folder_holds_what_diffusers_expects(pipe, folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {*COMPONENT_FILES, "model_index.json", CHECKSUMS}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    for name, ((library, kind), _, _) in COMPONENTS.items():
        assert index[name] == [library, kind]
        config = json.loads((folder / name / "config.json").read_text())
        assert config["_class_name"] == kind
        assert pipe.configs[name].items() <= config.items()
        assert {k for k in config if k not in pipe.configs[name]} <= {
            "_class_name", "_diffusers_version"
        }  # fmt: skip
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert index["scheduler"] == ["diffusers", scheduler["_class_name"]]
    assert (folder / "model_index.json").read_text().endswith("}\n")
    assert index["requires_safety_checker"] is False and index["safety_checker"] == [None, None]
    assert scheduler == pipe.configs["scheduler"]


def test_saving_what_was_loaded_writes_the_same_bytes(folder, tmp_path):
    Pipeline.load(folder).save(tmp_path / "again")
    for file in [*COMPONENT_FILES, "model_index.json"]:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_a_scheduler_config_without_a_class_name(pipe, tmp_path):
    scheduler = {k: v for k, v in pipe.configs["scheduler"].items() if k != "_class_name"}
    bare = Pipeline(pipe.configs | {"scheduler": scheduler}, pipe.params, pipe.tokenizer)
    assert bare.defaults["sampler"] == "ddim"
    bare.save(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


class Crash(Exception):
    pass


def crash_before(monkeypatch, number):
    """Let os.replace, by which every file appears, fail the `number`-th time it is called."""
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == number:
            raise Crash
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    return calls


@pytest.mark.parametrize(
    "number", mostly_slow(range(1, len(COMPONENT_FILES) + 4), 1, 2, 5, len(COMPONENT_FILES) + 3)
)
def test_a_save_that_was_cut_off_is_seen(pipe, folder, monkeypatch, number):
    """A second save over a whole folder that fails before any of its files, the last included."""
    calls = crash_before(monkeypatch, number)
    with pytest.raises(Crash):
        pipe.save(folder)
    files = [CHECKSUMS, *COMPONENT_FILES, "model_index.json", CHECKSUMS]
    assert calls == [folder / file for file in files[:number]]
    if number == 1:
        Pipeline.load(folder)  # nothing has changed yet
    else:
        with pytest.raises(Unfinished, match="the files are not of one model") as caught:
            Pipeline.load(folder)
        one_line(caught)

    monkeypatch.undo()
    pipe.save(folder)
    np.testing.assert_array_equal(
        generate(Pipeline.load(folder), PROMPTS[0]), generate(pipe, PROMPTS[0])
    )


def test_a_save_that_fails_leaves_no_scraps(pipe, folder, monkeypatch):
    crash_before(monkeypatch, 2)
    with pytest.raises(Crash):
        pipe.save(folder)
    assert list(folder.rglob(".*")) == []


@pytest.mark.parametrize("missing", ["folder", "model_index.json", *COMPONENT_FILES[:-1]])
def test_what_is_missing_is_named(folder, missing):
    if missing == "folder":
        with pytest.raises(FileNotFoundError, match="no-such-folder: no such file or folder"):
            Pipeline.load(folder.parent / "no-such-folder")
        return
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        Pipeline.load(folder)
    text = one_line(caught)
    assert str((folder / missing).parent) in text
    assert (folder / missing).name in text or "no weights" in text


@pytest.mark.parametrize(
    "file", [f for f in [*COMPONENT_FILES, "model_index.json"] if f.endswith(".json")]
)
@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff\xfe{}", b"null"])
def test_damaged_json_is_named(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Pipeline.load(folder)
    text = one_line(caught)
    assert str((folder / file).parent) in text and (folder / file).name in text


@pytest.mark.parametrize("name", COMPONENTS)
def test_damaged_weights_are_named(folder, name):
    file = folder / name / COMPONENTS[name][2]
    data = file.read_bytes()
    for cut in (0, 7, 100, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(WeightsError) as caught:
            Pipeline.load(folder)
        assert one_line(caught).startswith(f"{file}: ")


@pytest.mark.parametrize("name", COMPONENTS)
def test_weights_that_do_not_fit_are_listed(folder, name):
    file = folder / name / COMPONENTS[name][2]
    params = load_weights(file)
    first, second, *_ = sorted(params)
    short = params.pop(second).reshape(-1)[:-1]
    save_weights(file, {**params, second + "x": short, first: short})
    with pytest.raises(WeightsError) as caught:
        Pipeline.load(folder)
    text = one_line(caught)
    assert str(folder / name) in text
    assert f"missing (1): {second};" in text
    assert f"unexpected (1): {second}x;" in text
    assert f"misshapen (1): {first}: expected" in text


@pytest.mark.parametrize(
    "file", [f for f in [*COMPONENT_FILES, "model_index.json"] if not f.endswith(".safetensors")]
)
def test_an_edited_text_file_is_read_and_said(folder, file):
    with warnings.catch_warnings(record=True, action="always") as said:
        Pipeline.load(folder)
    assert said == []
    content = (folder / file).read_text()
    (folder / file).write_text(content + "\n" * (not file.endswith(".txt")))
    if file.endswith(".txt"):
        (folder / file).write_text(content.replace("#version: 0.2", "#version: 0.3"))
    with warnings.catch_warnings(record=True, action="always") as said:
        Pipeline.load(folder)
    assert [str(w.message) for w in said] == [
        f"{folder / file}: edited since the model was written"
    ]


@pytest.mark.parametrize("name", COMPONENTS)
def test_weights_of_another_model_are_refused(folder, name):
    file = folder / name / COMPONENTS[name][2]
    params = load_weights(file)
    changed = {key: w + 1 for key, w in params.items()}
    save_weights(file, changed, {"format": "pt"})
    with pytest.raises(
        WeightsError, match=f"{file}: not the weights that were .*{folder}/{CHECKSUMS}"
    ):
        Pipeline.load(folder)
    (folder / CHECKSUMS).unlink()
    assert (Pipeline.load(folder).params[name][min(params)] == changed[min(params)]).all()


def test_flipped_bits_in_a_folder_are_found(folder):
    """Anywhere in the numbers of any of its files."""
    rng = np.random.default_rng(0)
    for name, (_, _, weights) in COMPONENTS.items():
        file = folder / name / weights
        whole = file.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        for at in rng.integers(8 * start, 8 * len(whole), 20):
            flipped = bytearray(whole)
            flipped[at // 8] ^= 1 << at % 8
            file.write_bytes(flipped)
            with pytest.raises(WeightsError, match="damaged: its checksum was"):
                Pipeline.load(folder)
        file.write_bytes(whole)
    Pipeline.load(folder)


def test_while_another_export_is_written_the_reader_waits(pipe, folder):
    """The writer holds the lock of the folder, as a training run does."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from small_model import make_pipeline
from tinyldm.checkpoints import diffusers_folder
from tinyldm.lock import locked
from tinyldm.sampling.pipeline import Pipeline
pipe = Pipeline.load({str(folder)!r})
save = diffusers_folder.save_weights
diffusers_folder.save_weights = lambda *a: (print("begun", flush=True), time.sleep(0.3), save(*a))
name = min(pipe.params["unet"])
pipe.params["unet"][name] += 1
with locked({str(folder)!r}):
    pipe.save({str(folder)!r})
"""
    name = min(pipe.params["unet"])
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        with warnings.catch_warnings(record=True, action="always") as said:
            found = Pipeline.load(folder).params["unet"][name] - pipe.params["unet"][name]
    assert process.returncode == 0
    (message,) = (str(w.message) for w in said)  # it waits long, and says so once
    assert message == f"{folder}: a training run has yet to write the model; waiting for it"
    assert abs(found - 1).max() < 1e-5  # all of the new one: nothing was read before it was whole


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(({"_tinyldm": notes}, "_tinyldm: expected an object, found ") for notes in
          ([1], [], 5, 0, True, "x")),
        *(({name: [None, None]}, f"{name}: expected its library and class, found ") for name in
          ("unet", "vae")),
    ],
)  # fmt: skip
def test_an_index_that_cannot_be_is_named(folder, changes, says):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError) as caught:
        Pipeline.load(folder)
    assert one_line(caught).startswith(f"{file}: {says}")


@pytest.mark.parametrize("name", [None, 5, b"runs/demo", ""])
def test_what_is_no_name_of_a_folder(pipe, folder, name):
    for call in (Pipeline.load, pipe.save):
        with pytest.raises(ValueError, match="^folder: expected the name of a file or folder"):
            call(name)
    if name is not None:
        with pytest.raises(ValueError, match="^vae: expected the name of a file or folder"):
            Pipeline.load(folder, vae=name)


def test_a_long_word_in_a_config_is_cut(folder):
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"act_fn": "a" * 10**5}))
    with pytest.raises(ConfigError, match="aaa… is not implemented") as caught:
        Pipeline.load(folder)
    assert len(one_line(caught)) < 300


def test_a_config_that_is_not_implemented_is_named(folder):
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"class_embed_type": "timestep"}))
    with pytest.raises(ConfigError, match="unet config: class_embed_type = 'timestep'") as caught:
        Pipeline.load(folder)
    assert one_line(caught).startswith(f"{file}: ")


def test_a_damaged_list_of_shards_is_named(folder):
    (folder / "unet" / COMPONENTS["unet"][2]).unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for content in ("{", "{}", "[]"):
        index.write_text(content)
        with pytest.raises(ValueError) as caught:
            Pipeline.load(folder)
        assert index.name in one_line(caught)


def test_a_missing_shard_is_named(folder):
    weights = folder / "unet" / COMPONENTS["unet"][2]
    weights.rename(weights.with_name("one.safetensors"))
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="missing beside it: two.safetensors") as caught:
        Pipeline.load(folder)
    assert one_line(caught).startswith(str(index))


def test_a_shard_elsewhere_is_refused(folder):
    (folder / "unet" / COMPONENTS["unet"][2]).unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors", "b": "../b.safetensors"}}))
    with pytest.raises(WeightsError, match="'../a.safetensors' is not the name of a file beside"):
        Pipeline.load(folder)


def test_the_scheduler_is_that_of_the_index(folder):
    """Take the scheduler's class from model_index.json, as diffusers does."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    del index["_tinyldm"]
    file.write_text(json.dumps(index))
    with warnings.catch_warnings(record=True, action="always") as said:
        assert Pipeline.load(folder).defaults["sampler"] == "euler"
    assert any(
        "names a DDIMScheduler, and model_index.json a Euler" in str(w.message) for w in said
    )


def test_an_attention_mask_is_refused(folder):
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_attention_mask": True}))
    with pytest.raises(ConfigError, match="use_attention_mask is not implemented") as caught:
        Pipeline.load(folder)
    assert one_line(caught).startswith(f"{file}: ")


def test_any_flipped_bit_of_the_list_of_checksums_is_seen(folder):
    file = folder / CHECKSUMS
    whole = file.read_bytes()
    for at in np.random.default_rng(0).integers(0, 8 * len(whole), 60):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        file.write_bytes(flipped)
        try:
            same = json.loads(flipped) == json.loads(whole)  # a space for a space
        except ValueError:
            same = False
        if not same:
            with pytest.raises(ValueError, match=str(file)):
                Pipeline.load(folder)


@pytest.mark.parametrize("files", [{"../a.json": "0"}, {"/etc/hostname": "0"}, ["a"], None, 5])
def test_a_list_of_checksums_leads_nowhere_else(folder, files):
    """Refuse names that lead out of the folder, though the list has a right checksum itself."""
    crc = f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"
    content = json.loads((folder / CHECKSUMS).read_text()) | {"files": files, "crc": crc}
    (folder / CHECKSUMS).write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=f"{folder / CHECKSUMS}: damaged"):
        Pipeline.load(folder)


def test_another_autoencoder_stands_in_for_one_that_is_gone(folder, tmp_path):
    """Load a folder whose recorded vae is missing, where another one is given."""
    shutil.move(folder / "vae", tmp_path / "vae")
    with pytest.raises(FileNotFoundError, match="vae"):
        Pipeline.load(folder)
    with warnings.catch_warnings(record=True, action="always") as said:
        loaded = Pipeline.load(folder, vae=tmp_path / "vae")
    assert said == [] and loaded.params["vae"] and loaded.params["unet"]


def test_a_scheduler_that_cannot_be_is_named_with_its_file(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "num_train_timesteps": 0}))
    with pytest.raises(ConfigError) as caught:
        Pipeline.load(folder)
    assert one_line(caught).startswith(f"{file}: ")


def test_the_fingerprint_sees_weights_configs_and_tokenizer(folder):
    pipe = Pipeline.load(folder)
    expected = fingerprint(pipe)
    assert fingerprint(Pipeline.load(folder)) == expected and len(expected) == 16
    name = min(pipe.params["vae"])
    pipe.params["vae"][name].reshape(-1)[-1] += 1
    assert fingerprint(pipe) != expected
    pipe = Pipeline.load(folder)
    pipe.configs["scheduler"] = pipe.configs["scheduler"] | {"steps_offset": 0}
    assert fingerprint(pipe) != expected
    pipe = Pipeline.load(folder)
    pipe.tokenizer.max_length -= 1
    assert fingerprint(pipe) != expected


# ------------------------------------------------------------------------------- folders of others


def test_latents_are_not_clipped_where_the_scheduler_says_nothing(pipe, tmp_path):
    """Schedulers that never clip do not write the key, and ddim would clip by default."""
    silent = {k: v for k, v in pipe.configs["scheduler"].items() if k != "clip_sample"}
    other = Pipeline(pipe.configs | {"scheduler": silent}, pipe.params, pipe.tokenizer)
    for sampler in ("ddim", "ddpm"):
        options = {"sampler": sampler, "steps": 4, "guidance": 2.0}
        np.testing.assert_array_equal(
            generate(other, PROMPTS[:1], **options), generate(pipe, PROMPTS[:1], **options)
        )
    clips = pipe.configs | {"scheduler": silent | {"clip_sample": True}}
    clips = Pipeline(clips, pipe.params, pipe.tokenizer)
    options = {"sampler": "ddim", "steps": 4, "guidance": 2.0}
    assert (generate(clips, PROMPTS[:1], **options) != generate(pipe, PROMPTS[:1], **options)).any()
    clips.save(tmp_path)  # but diffusers repairs such a file
    np.testing.assert_array_equal(
        generate(Pipeline.load(tmp_path), PROMPTS[:1], **options),
        generate(pipe, PROMPTS[:1], **options),
    )


def test_a_scheduler_that_is_not_implemented_is_named_with_the_way_out(pipe):
    scheduler = pipe.configs["scheduler"] | {"_class_name": "UniPCMultistepScheduler"}
    other = Pipeline(pipe.configs | {"scheduler": scheduler}, pipe.params, pipe.tokenizer)
    with pytest.raises(ValueError, match="the model names a UniPCMultistepScheduler.*--sampler"):
        other(PROMPTS[0], steps=2)
    assert len(other(PROMPTS[0], steps=2, sampler="euler")) == 1
