"""Stable Diffusion's own architectures, narrow and once at full size, against their peers.

Weights are random; every flag is that of the published models. A single file in the original layout
is read by diffusers' converter and by ours.
"""

import contextlib
import subprocess
import sys
from types import ModuleType

import numpy as np
import peers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as converters
from model_cases import integers, numbers, random_params
from original_layout import MODELS, narrow, random_model, to_original
from safetensors.torch import load_file

from tinyldm.checkpoints import single_file as original
from tinyldm.checkpoints.safetensors import WeightsError, load_weights, save_weights
from tinyldm.checkpoints.single_file import load_original
from tinyldm.nn import no_grad

ARCHITECTURES = {"1.5": (1, 4), "1.5 inpainting": (1, 9), "2.1": (2, 4), "2 inpainting": (2, 9)}
PRECISIONS = [(np.float32, 1e-4), (np.float64, 1e-9)]


@pytest.fixture(params=ARCHITECTURES)
def configs(request):
    return narrow(*ARCHITECTURES[request.param])[0]


def in_torch(component, config, params, dtype):
    """The module of diffusers or transformers with these weights."""
    if component == "text_encoder":
        module = peers.text_module(config)
        prefix = peers.text_prefix(module)
        params = {name.removeprefix(prefix): x for name, x in params.items()}
    else:
        kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component]
        with torch.device("meta"):
            module = kind.from_config(config)
    weights = {
        name: torch.from_numpy(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x)
        for name, x in params.items()
    }
    module.load_state_dict(weights, strict=True, assign=True)
    return module.to({np.float32: torch.float32, np.float64: torch.float64}[dtype]).eval()


def outputs(component, config, params, dtype, side=8):
    """[(ours, theirs)] of one component."""
    model = MODELS[component](config)
    params = {name: x.astype(dtype) for name, x in params.items()}
    module = in_torch(component, config, params, dtype)

    def tensor(x):
        return torch.tensor(x.transpose(0, 3, 1, 2))

    exact = peers.InFloat64() if dtype is np.float64 else contextlib.nullcontext()
    with no_grad(), torch.no_grad(), exact:
        if component == "text_encoder":
            ids = integers("ids", model.config.vocab_size, 2, 77)
            y = module(torch.tensor(ids)).last_hidden_state.numpy()
            return [(model(params, ids)[0], y)]
        if component == "unet":
            x = numbers("x", 2, side, side + 8, model.config.in_channels).astype(dtype)
            context = numbers("context", 2, 77, model.config.cross_attention_dim).astype(dtype)
            t = np.array([981, 1])
            y = module(tensor(x), torch.tensor(t), torch.tensor(context)).sample
            return [(model(params, x, t, context)[0], peers.pixels_to_numpy(y))]
        z = numbers("z", 1, side, side + 2, 4).astype(dtype)
        images = numbers("images", 1, 8 * side, 8 * side + 16, 3).astype(dtype)
        moments = module.encode(tensor(images)).latent_dist.parameters
        decoded = module.decode(tensor(z)).sample
        return [
            (model.encode(params, images)[0], peers.pixels_to_numpy(moments)),
            (model.decode(params, z)[0], peers.pixels_to_numpy(decoded)),
        ]


def assert_near(pairs, tolerance):
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert theirs.std() > 0.01 * abs(theirs).max() > 0
        assert abs(ours - theirs).max() <= tolerance * abs(theirs).max()


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize("component", MODELS)
def test_narrow_networks(configs, component, dtype, tolerance):
    config = configs[component]
    params = random_params(MODELS[component](config).shapes(), component)
    assert_near(outputs(component, config, params, dtype), tolerance)


@pytest.mark.parametrize("component", MODELS)
def test_full_size(component):
    """Of Stable Diffusion 1.5, in float32: 860, 84 and 123 million parameters."""
    configs, _ = original.VERSIONS[768]
    config = configs[component]
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in MODELS[component](config).shapes().items():
        x = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            x *= (np.prod(shape[:3]) if len(shape) == 4 else shape[1]) ** -0.5
        params[name] = x if len(shape) > 1 else 0.2 * x + name.endswith("norm.weight")
    assert_near(outputs(component, config, params, np.float32, side=16), 1e-4)


# ---------------------------------------------------------------------------------------- one file


@pytest.fixture(scope="module", params=ARCHITECTURES)
def single_file(request, tmp_path_factory):
    """version, configs, params and the file in the original layout."""
    version, channels = ARCHITECTURES[request.param]
    configs, pad, params = random_model(version, channels)
    file = tmp_path_factory.mktemp("original") / "model.safetensors"
    save_weights(file, to_original(params, version))
    return version, configs, pad, params, file


def test_a_single_file_is_read_as_diffusers_converts_it(single_file, monkeypatch):
    version, configs, pad, params, file = single_file
    monkeypatch.setattr(original, "VERSIONS", {64: (configs, pad)})
    _, ours, tokenizer = load_original(file)
    assert tokenizer.pad_id == {1: tokenizer.end_id, 2: 0}[version]

    stored = load_file(file)
    module = peers.text_module(configs["text_encoder"])
    unet_config = dict(configs["unet"], layers_per_block=2, class_embed_type=None)
    unet_config |= {"addition_embed_type": None}
    theirs = {
        "unet": converters.convert_ldm_unet_checkpoint(dict(stored), unet_config),
        "vae": converters.convert_ldm_vae_checkpoint(dict(stored), configs["vae"]),
    }
    if version == 1:
        text = converters.convert_ldm_clip_checkpoint(
            dict(stored), remove_prefix="cond_stage_model.transformer."
        )
    else:
        text = converters.convert_open_clip_checkpoint(module, dict(stored))
    layers = configs["text_encoder"]["num_hidden_layers"]
    theirs["text_encoder"] = {
        name if name.startswith("text_model.") else f"text_model.{name}": x
        for name, x in text.items()
        if f".layers.{layers}." not in name and not name.startswith("text_projection")
    }
    for component, converted in theirs.items():
        converted = {n: x for n, x in converted.items() if not n.endswith("position_ids")}
        assert converted.keys() == ours[component].keys() == params[component].keys()
        for name, x in converted.items():
            x = peers.weight_to_numpy(x)
            if x.ndim == 4 and ours[component][name].ndim == 2:
                x = x[0, 0].T
            np.testing.assert_array_equal(ours[component][name], x, err_msg=name)
            np.testing.assert_array_equal(params[component][name], x, err_msg=name)


LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


def test_the_conversion_that_the_error_names_works(tmp_path, monkeypatch):
    """A pickle is refused; the command in the message turns it into a file that is read."""
    old, new = tmp_path / "old.ckpt", tmp_path / "new.safetensors"
    half = torch.randn(3, 4, 1, 2).half()
    state = {"a.weight": half, "a.again": half, "b": torch.arange(3.0)[1:]}
    # As Lightning writes them: beside the weights notes of its callbacks, under their classes.
    kind = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
    packages = [LIGHTNING.rsplit(".", i)[0] for i in range(3)]
    for package in packages:
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    sys.modules[LIGHTNING].ModelCheckpoint = kind
    torch.save({"state_dict": state, "global_step": 7, "callbacks": {kind: {"best": 1.0}}}, old)
    with pytest.raises(WeightsError) as refused:
        load_weights(old)
    command = str(refused.value).partition('python -c "')[2].partition('"')[0]
    assert command
    subprocess.run([sys.executable, "-c", command, old, new], check=True)
    loaded = load_weights(new)
    assert loaded.keys() == state.keys()
    for name, x in state.items():
        np.testing.assert_array_equal(loaded[name], peers.weight_to_numpy(x))
