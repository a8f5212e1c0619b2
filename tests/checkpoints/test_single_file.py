"""Stable Diffusion in one file of the original layout: what is read, and what is refused."""

import json
import pickle
import re
import warnings

import numpy as np
import pytest
from original_layout import narrow, random_model, to_original
from slow import mostly_slow
from small_model import generate

from tinyldm.checkpoints import single_file as original
from tinyldm.checkpoints.safetensors import WeightsError, load_weights, save_weights
from tinyldm.checkpoints.single_file import load_original, load_original_vae
from tinyldm.config import ConfigError
from tinyldm.sampling.pipeline import Pipeline

one_version = pytest.mark.parametrize("made", ["2"], indirect=True)  # the one that has most
VERSIONS = {"1": (1, 4), "1 inpainting": (1, 9), "2": (2, 4)}


@pytest.fixture(scope="module", params=VERSIONS)
def made(request):
    """version, configs, padding token, params, and the tensors of the file."""
    version, channels = VERSIONS[request.param]
    configs, pad, params = random_model(version, channels)
    return version, configs, pad, params, to_original(params, version)


@pytest.fixture
def known(made, monkeypatch):
    """The narrow architecture is the one that is known."""
    _, configs, pad, _, _ = made
    original_configs, _ = narrow(made[0], 4)
    monkeypatch.setattr(original, "VERSIONS", {64: (original_configs, pad)})
    monkeypatch.setattr(original, "LARGE_SIDE", 12)
    return configs


def assert_equal_params(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_every_tensor_finds_its_place(made, known, tmp_path):
    _, _, pad, params, stored = made
    save_weights(tmp_path / "model.safetensors", stored)
    configs, found, tokenizer = load_original(tmp_path / "model.safetensors")
    for name, expected in params.items():
        assert_equal_params(found[name], expected)
    assert configs["unet"]["in_channels"] == known["unet"]["in_channels"]
    assert tokenizer.pad_token == pad and len(tokenizer) == 49408
    assert original.VERSIONS[64][0]["unet"].get("in_channels", 4) == 4, "the table was changed"


@one_version
def test_half_precision(made, known, tmp_path):
    _, _, _, params, stored = made
    halves = {n: x.astype(np.float16) if x.dtype == np.float32 else x for n, x in stored.items()}
    save_weights(tmp_path / "model.safetensors", halves)
    _, found, _ = load_original(tmp_path / "model.safetensors")
    for component, expected in params.items():
        rounded = {n: x.astype(np.float16).astype(np.float32) for n, x in expected.items()}
        assert_equal_params(found[component], rounded)


@one_version
def test_averaged_weights_are_taken_where_there_are_any(made, known, tmp_path):
    _, _, _, params, stored = made
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): x * np.float32(1.01)
        for name, x in stored.items()
        if name.startswith("model.diffusion_model.")
    }
    average |= {"model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int64(7)}
    save_weights(tmp_path / "model.safetensors", stored | average)
    _, found, _ = load_original(tmp_path / "model.safetensors")
    assert_equal_params(found["unet"], {n: x * np.float32(1.01) for n, x in params["unet"].items()})
    assert_equal_params(found["vae"], params["vae"])


@pytest.mark.slow
@one_version
def test_an_image_from_a_file_is_that_from_the_folder(made, known, tmp_path):
    _, configs, pad, params, stored = made
    save_weights(tmp_path / "model.safetensors", stored)
    one = Pipeline.load(tmp_path / "model.safetensors")
    one.save(tmp_path / "folder")
    options = {"size": 64, "steps": 2, "seed": 3}
    np.testing.assert_array_equal(
        generate(one, "a cat", **options),
        generate(Pipeline.load(tmp_path / "folder"), "a cat", **options),
    )
    assert one.defaults == {"steps": 50, "guidance": 7.5, "sampler": "pndm"}


@one_version
def test_what_does_not_fit_is_listed_at_once(made, known, tmp_path):
    stored = dict(made[-1])
    del stored["model.diffusion_model.out.2.bias"], stored["first_stage_model.quant_conv.weight"]
    stored["model.diffusion_model.out.0.bias"] = np.zeros(5, np.float32)
    stored["lora.up"] = stored["first_stage_model.decoder.odd"] = np.zeros(1, np.float32)
    save_weights(tmp_path / "model.safetensors", stored)
    with pytest.raises(WeightsError) as caught:
        load_original(tmp_path / "model.safetensors")
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    for part in (
        "missing (2): unet/conv_out.bias, vae/quant_conv.weight",
        "unexpected (2): lora.up, vae/decoder.odd",
        "misshapen (1): unet/conv_norm_out.bias: expected (32,), found (5,)",
    ):
        assert part in message


# --------------------------------------------------------------------------------- what it predicts


class Denoiser:
    """The best prediction where latents are standard normal and hardly any signal is left."""

    def __init__(self, slope, channels):
        self.slope = slope
        self.config = type("Config", (), {"sample_size": 8, "in_channels": channels,
                                          "out_channels": 4})  # fmt: skip

    def __call__(self, params, x, t, context):
        assert t.tolist() == [999] and context.shape == (1, 77, 64)
        assert x.shape[3] == self.config.in_channels
        if x.shape[3] == 9:
            assert (x[..., 4] == 1).all() and (x[..., 5:] == 0).all()
        own = np.random.default_rng(5).standard_normal((*x.shape[:3], 4), np.float32)
        return self.slope * x[..., :4] + 0.3 * own, None


@pytest.mark.slow
@pytest.mark.parametrize(
    "slope, prediction",
    mostly_slow(
        [(0.998, "epsilon"), (0.8, "epsilon"), (0.0, "v_prediction")],
        (0.8, "epsilon"),
        (0.0, "v_prediction"),
    ),
)
def test_the_network_is_asked_what_it_predicts(
    made, known, tmp_path, monkeypatch, slope, prediction
):
    """Of unit normal latents, ε is best predicted by s x, and v by 0."""
    save_weights(tmp_path / "model.safetensors", made[-1])
    channels = known["unet"]["in_channels"]
    real = original._measure_prediction

    def measure(*args):
        with monkeypatch.context() as patch:
            patch.setattr(original, "UNet", lambda config: Denoiser(slope, channels))
            return real(*args)

    monkeypatch.setattr(original, "_measure_prediction", measure)
    configs, _, _ = load_original(tmp_path / "model.safetensors")
    assert configs["scheduler"]["prediction_type"] == prediction
    assert configs["unet"]["sample_size"] == {"epsilon": 8, "v_prediction": 12}[prediction]


# ------------------------------------------------------------------------------- autoencoders alone


@pytest.fixture
def vae_file(made, monkeypatch, tmp_path):
    """A file, and the weights in it."""
    _, configs, _, params, stored = made
    monkeypatch.setattr(original, "VAE", configs["vae"])
    alone = {
        name.removeprefix("first_stage_model."): x
        for name, x in stored.items()
        if name.startswith("first_stage_model.")
    }
    alone |= {"loss.logvar": np.float32(0), "loss.perceptual_loss.lin0.weight": np.zeros(3)}
    save_weights(tmp_path / "vae.safetensors", alone)
    save_weights(tmp_path / "whole.safetensors", stored)
    return tmp_path, params["vae"]


@one_version
@pytest.mark.parametrize("name", ["vae.safetensors", "whole.safetensors"])
def test_an_autoencoder_from_a_file(vae_file, name):
    folder, expected = vae_file
    config, params = load_original_vae(folder / name)
    assert config["block_out_channels"] == [32, 64, 128, 128]
    assert_equal_params(params, expected)


@pytest.mark.slow
@one_version
def test_another_autoencoder_for_a_pipeline(made, known, vae_file, tmp_path):
    folder, expected = vae_file
    other = {n: x * 2 for n, x in made[-1].items() if n.startswith("first_stage_model.")}
    save_weights(tmp_path / "model.safetensors", made[-1] | other)
    file = tmp_path / "model.safetensors"
    assert_equal_params(Pipeline.load(file, vae=folder / "vae.safetensors").params["vae"], expected)
    Pipeline.load(folder / "whole.safetensors").save(tmp_path / "folder")
    for vae in (tmp_path / "folder", tmp_path / "folder" / "vae"):
        assert_equal_params(Pipeline.load(file, vae=vae).params["vae"], expected)


@pytest.mark.slow
@one_version
def test_another_autoencoder_instead_of_one_that_is_missing(made, known, vae_file, tmp_path):
    folder, expected = vae_file
    without = {n: x for n, x in made[-1].items() if not n.startswith("first_stage_model.")}
    save_weights(tmp_path / "model.safetensors", without)
    one = Pipeline.load(tmp_path / "model.safetensors", vae=folder / "vae.safetensors")
    assert_equal_params(one.params["vae"], expected)
    one.save(tmp_path / "folder")
    (tmp_path / "folder" / "vae").rename(tmp_path / "elsewhere")
    other = Pipeline.load(tmp_path / "folder", vae=tmp_path / "elsewhere")
    assert_equal_params(other.params["vae"], expected)
    # A file of that folder, with its config beside it.
    file = tmp_path / "elsewhere" / "diffusion_pytorch_model.safetensors"
    old = {
        name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value")
        .replace("to_out.0", "proj_attn"): x
        for name, x in expected.items()
    }  # fmt: skip
    save_weights(file, old)
    config = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config | {"scaling_factor": 2}))
    other = Pipeline.load(tmp_path / "folder", vae=file)
    assert_equal_params(other.params["vae"], expected)
    assert other.vae.config.scaling_factor == 2


@one_version
def test_averages_in_a_file_of_an_autoencoder_are_passed_over(vae_file):
    folder, expected = vae_file
    stored = load_weights(folder / "vae.safetensors")
    save_weights(folder / "vae.safetensors", stored | {"model_ema.decoderconv_inbias": np.ones(3)})
    assert_equal_params(load_original_vae(folder / "vae.safetensors")[1], expected)


@pytest.mark.slow
@one_version
def test_odd_tensors_that_nobody_needs(made, known, tmp_path):
    """Of other types, and a fused weight that is a single number."""
    import safetensors.numpy

    file = tmp_path / "model.safetensors"
    save_weights(file, made[-1])
    tensors = safetensors.numpy.load_file(file)
    mask = {"cond_stage_model.model.attn_mask": np.zeros((77, 77), bool)}
    safetensors.numpy.save_file(tensors | mask, file)
    load_original(file)
    odd = {"model.diffusion_model.out.2.bias": np.zeros(4, bool)}
    safetensors.numpy.save_file(tensors | odd, file)
    with pytest.raises(WeightsError, match="out.2.bias: dtype BOOL is not supported"):
        load_original(file)
    fused = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    save_weights(file, made[-1] | {fused: np.float32(1)})
    with pytest.raises(WeightsError, match="layers.0.self_attn"):
        load_original(file)


# ---------------------------------------------------------------------------------- what is refused


def test_other_models_are_named(tmp_path):
    file = tmp_path / "model.safetensors"
    xl = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    for name, kind in (
        (xl, "a file"),
        ("conditioner.embedders.0.weight", "Stable Diffusion XL"),
        ("lora_unet_down_blocks_0.lora_up.weight", "a LoRA"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "a component of a diffusers folder"),
    ):
        save_weights(file, {name: np.zeros((640, 2048), np.float32)})
        with pytest.raises(ConfigError, match="not a whole Stable Diffusion 1 or 2") as caught:
            Pipeline.load(file)
        message = str(caught.value)
        assert "\n" not in message and message.startswith(str(file))
        assert f"but {kind}" in message and name in message
    save_weights(file, {})
    with pytest.raises(ConfigError, match="a file of 0 tensors"):
        Pipeline.load(file)


@one_version
@pytest.mark.parametrize(
    "names",
    [
        {"attn_1.q": "attn_1.to_q", "attn_1.k": "attn_1.to_k", "attn_1.v": "attn_1.to_v",
         "attn_1.proj_out": "attn_1.to_out.0"},
        {"attn_1.q": "attn_1.query", "attn_1.k": "attn_1.key", "attn_1.v": "attn_1.value",
         "attn_1.proj_out": "attn_1.proj_attn"},
        {"mid.attn_1.norm": "mid_block.attentions.0.group_norm",
         "mid.attn_1.q": "mid_block.attentions.0.query",
         "mid.attn_1.k": "mid_block.attentions.0.key",
         "mid.attn_1.v": "mid_block.attentions.0.value",
         "mid.attn_1.proj_out": "mid_block.attentions.0.proj_attn"},
        "diffusers",
    ],
)  # fmt: skip
@pytest.mark.parametrize("matrices", mostly_slow([False, True], True))
def test_other_names_in_the_autoencoder(made, known, tmp_path, names, matrices):
    _, _, _, params, stored = made
    changed = {}
    for name, x in stored.items():
        if not name.startswith("first_stage_model."):
            changed[name] = x
            continue
        if names == "diffusers":
            continue
        for old, new in names.items():
            name = name.replace(f".{old}.", f".{new}.")
        if matrices and "attn" in name and x.ndim == 4:
            x = x[0, 0].T
        changed[name] = x
    if names == "diffusers":
        changed |= {f"first_stage_model.{name}": x for name, x in params["vae"].items()}
    save_weights(tmp_path / "model.safetensors", changed)
    _, found, _ = load_original(tmp_path / "model.safetensors")
    assert_equal_params(found["vae"], params["vae"])


STRAY = [
    "embedding_manager.string_to_param.*", "denoiser.sigmas", "optimizer.state.0",
    "optimizer_states.0.exp_avg", "lora_unet_down_blocks_0.lora_up.weight",
    "lora_te_text_model.alpha", "safety_checker.concept_embeds", "lr_schedulers.0.base",
    "alphas_cumprod", "model_ema.decay",
]  # fmt: skip


@one_version
@pytest.mark.parametrize("stray", mostly_slow(STRAY, STRAY[4], STRAY[8]))
def test_stray_tensors_are_said_and_not_used(made, known, tmp_path, stray):
    file = tmp_path / "model.safetensors"
    save_weights(file, made[-1] | {stray: np.zeros(3, np.float32)})
    with warnings.catch_warnings(record=True, action="always") as said:
        _, found, _ = load_original(file)
    assert_equal_params(found["unet"], made[-2]["unet"])
    expected = [f"{file}: 1 tensors are not used: {stray}"]
    of_every_file = stray in ("alphas_cumprod", "model_ema.decay")
    assert [str(w.message) for w in said] == ([] if of_every_file else expected)


@one_version
@pytest.mark.parametrize(
    "root, says",
    [("first_stage_model.", "no autoencoder .*--vae"), ("cond_stage_model.", "no text encoder")],
)
def test_files_without_a_part_say_which(made, known, tmp_path, root, says):
    file = tmp_path / "model.safetensors"
    save_weights(file, {n: x for n, x in made[-1].items() if not n.startswith(root)})
    with pytest.raises(ConfigError, match=says) as caught:
        Pipeline.load(file)
    assert len(str(caught.value)) < 200 + len(str(file))


@one_version
def test_notes_that_are_null(made, known, tmp_path):
    file = tmp_path / "model.safetensors"
    save_weights(file, made[-1])
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n]) | {"__metadata__": None}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
    assert_equal_params(load_original(file)[1]["unet"], made[-2]["unet"])


@one_version
def test_in_channels_that_mean_something_else(made, known, tmp_path):
    """Tensors such as those of the model that edits images by instruction."""
    stored = dict(made[-1])
    stored["model.diffusion_model.input_blocks.0.0.weight"] = np.zeros((3, 3, 8, 32), np.float32)
    save_weights(tmp_path / "model.safetensors", stored)
    with pytest.raises(ConfigError, match="in_channels = 8 is not implemented .* only 4, or 9"):
        Pipeline.load(tmp_path / "model.safetensors")


@one_version
@pytest.mark.parametrize("at", [4, 1000, -100])
def test_a_file_that_is_cut_off(made, known, tmp_path, at):
    file = tmp_path / "model.safetensors"
    save_weights(file, made[-1])
    file.write_bytes(file.read_bytes()[:at])
    with pytest.raises(WeightsError) as caught:
        Pipeline.load(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_pickle_is_not_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps({"state_dict": Bomb()}))
    with pytest.raises(WeightsError, match="pickle of torch") as caught:
        Pipeline.load(tmp_path / name)
    assert re.search(r"python -c \".*weights_only=True.*\" OLD NEW\.safetensors", str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == [name]
