"""The original single-file layout, written out block by block: the way there, for the tests.

It goes from the structure of the networks; `tinyldm.checkpoints.single_file` goes from the names.
"""

import numpy as np
from model_cases import random_params

from tinyldm.checkpoints.single_file import VERSIONS
from tinyldm.models import AutoencoderKL, TextEncoder, UNet

MODELS = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": TextEncoder}
NARROW = {"block_out_channels": [32, 64, 128, 128]}


def narrow(version, in_channels=4):
    """The configs of Stable Diffusion 1 or 2, made narrow: every flag as in the original."""
    configs, pad = VERSIONS[{1: 768, 2: 1024}[version]]
    heads = {1: 8, 2: [2, 4, 8, 8]}[version]
    changes = {
        "unet": NARROW
        | {
            "attention_head_dim": heads,
            "cross_attention_dim": 64,
            "sample_size": 8,
            "in_channels": in_channels,
        },
        "vae": NARROW | {"sample_size": 64},
        "text_encoder": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_hidden_layers": {1: 3, 2: 4}[version],
        },
        "scheduler": {},
    }
    return {name: dict(config) | changes[name] for name, config in configs.items()}, pad


def random_model(version, in_channels=4):
    """→ configs, padding token, params: every weight random, float32."""
    configs, pad = narrow(version, in_channels)
    params = {
        name: {
            key: x.astype(np.float32)
            for key, x in random_params(model(configs[name]).shapes(), name).items()
        }
        for name, model in MODELS.items()
    }
    return configs, pad, params


def _unet():
    yield "conv_in", "input_blocks.0.0"
    for i, name in enumerate(("linear_1", "linear_2")):
        yield f"time_embedding.{name}", f"time_embed.{2 * i}"
    n = 0
    for level in range(4):
        for i in range(2):
            n += 1
            yield f"down_blocks.{level}.resnets.{i}", f"input_blocks.{n}.0"
            yield f"down_blocks.{level}.attentions.{i}", f"input_blocks.{n}.1"
        n += 1
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{name}", f"middle_block.{i}"
    n = 0
    for level in range(4):
        for i in range(3):
            yield f"up_blocks.{level}.resnets.{i}", f"output_blocks.{n}.0"
            yield f"up_blocks.{level}.attentions.{i}", f"output_blocks.{n}.1"
            n += 1
        place = 1 if level == 0 else 2  # the coarsest level has no attention before it
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{n - 1}.{place}.conv"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _vae():
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_in", f"{side}.conv_in"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
        yield f"{side}.mid_block.resnets.0", f"{side}.mid.block_1"
        yield f"{side}.mid_block.resnets.1", f"{side}.mid.block_2"
        yield f"{side}.mid_block.attentions.0.group_norm", f"{side}.mid.attn_1.norm"
        for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            yield f"{side}.mid_block.attentions.0.{ours}", f"{side}.mid.attn_1.{theirs}"
    for level in range(4):
        for i in range(2):
            yield f"encoder.down_blocks.{level}.resnets.{i}", f"encoder.down.{level}.block.{i}"
        for i in range(3):
            yield f"decoder.up_blocks.{level}.resnets.{i}", f"decoder.up.{3 - level}.block.{i}"
        down = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        yield down, f"encoder.down.{level}.downsample.conv"
        up = f"decoder.up_blocks.{level}.upsamplers.0.conv"
        yield up, f"decoder.up.{3 - level}.upsample.conv"
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name


def _unet_names(names):
    table = sorted(_unet(), key=lambda pair: -len(pair[0]))
    for name in names:
        ours, theirs = next(pair for pair in table if name.startswith(pair[0] + "."))
        rest = name[len(ours) + 1 :]
        if ".resnets." in ours:
            part, _, kind = rest.partition(".")
            rest = f"{IN_RESNET[part]}.{kind}"
        yield name, f"model.diffusion_model.{theirs}.{rest}"


def _vae_names(names):
    table = sorted(_vae(), key=lambda pair: -len(pair[0]))
    for name in names:
        ours, theirs = next(pair for pair in table if name.startswith(pair[0] + "."))
        rest = name[len(ours) + 1 :].replace("conv_shortcut", "nin_shortcut")
        yield name, f"first_stage_model.{theirs}.{rest}"


def to_original(params, version):
    """{component: {name: array}} → {name in the original file: array}, in our memory layout."""
    stored = {}
    for name, original in _unet_names(params["unet"]):
        stored[original] = params["unet"][name]
    for name, original in _vae_names(params["vae"]):
        x = params["vae"][name]
        if "attn_1" in original and x.ndim == 2:
            x = x.T[None, None]  # there 1×1 convolutions
        stored[original] = x
    text = params["text_encoder"]
    if version == 1:
        stored |= {f"cond_stage_model.transformer.{name}": x for name, x in text.items()}
        positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        stored[positions] = np.arange(77)[None]
    else:
        stored |= dict(_open_clip(text))
    stored["betas"] = stored["alphas_cumprod"] = np.linspace(0, 1, 1000, dtype=np.float32)
    return stored


def _open_clip(text):
    root, here = "cond_stage_model.model", "text_model"
    yield f"{root}.token_embedding.weight", text[f"{here}.embeddings.token_embedding.weight"]
    positions = text[f"{here}.embeddings.position_embedding.weight"]
    yield f"{root}.positional_embedding", positions
    for kind in ("weight", "bias"):
        yield f"{root}.ln_final.{kind}", text[f"{here}.final_layer_norm.{kind}"]
    layers = sum(name.endswith("fc1.bias") for name in text)
    for i in range(layers + 1):  # the file has one more than is used
        layer = f"{here}.encoder.layers.{min(i, layers - 1)}"
        there = f"{root}.transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            parts = [text[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            yield f"{there}.attn.in_proj_{kind}", np.concatenate(parts)
            for theirs, ours in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                yield f"{there}.{theirs}.{kind}", text[f"{layer}.{ours}.{kind}"]
    yield f"{root}.text_projection", np.eye(positions.shape[1], dtype=np.float32)
    yield f"{root}.logit_scale", np.float32(4.6)
