"""The U-Net against diffusers' UNet2DConditionModel: names, shapes, outputs, every gradient."""

import math

import peers
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from model_cases import SD15_UNET, numbers, random_params, unet_configs, unet_inputs

from tinyldm.models import UNet

BASE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 12],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
PLAIN = {
    "down_block_types": ["DownBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D"] * 2,
}
THREE_LEVELS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [4, 12, 8],
}
CHANGES = [
    {},
    PLAIN,
    THREE_LEVELS,
    {"mid_block_type": "UNetMidBlock2D"},
    {"mid_block_type": None},
    PLAIN | {"mid_block_type": "UNetMidBlock2DCrossAttn"},  # the middle alone attends to the text
    {"use_linear_projection": True},
    {"transformer_layers_per_block": 2},
    THREE_LEVELS | {"transformer_layers_per_block": [2, 1, 3]},
    {"attention_head_dim": 1},
    {"attention_head_dim": [4, 3]},
    {"layers_per_block": 2},
    {
        "layers_per_block": [0, 1],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
    THREE_LEVELS | {"layers_per_block": [1, 3, 2]},
    {"addition_embed_type": "text", "addition_embed_type_num_heads": 3},
    PLAIN | {"addition_embed_type": "text", "addition_embed_type_num_heads": 1},
    {"num_class_embeds": 5},
    {"flip_sin_to_cos": False},
    {"freq_shift": 1},
    {"in_channels": 9, "out_channels": 2},
    {"conv_in_kernel": 1, "conv_out_kernel": 5},
    {"norm_eps": 0.1},
    {"norm_num_groups": 1},
    {"time_embedding_dim": 10},
    {"block_out_channels": [9, 6], "norm_num_groups": 3, "attention_head_dim": 3},  # odd waves
    {"conv_in_kernel": 2, "conv_out_kernel": 4},  # even ones lose a row and a column
    {"act_fn": "swish", "upcast_attention": True},
]


def both(config, inputs):
    """Output and gradients, ours and theirs."""
    unet = UNet(config)
    params = random_params(unet.shapes())
    y, backward = unet(params, *inputs)
    dy = numbers("dy", *y.shape)
    grads = {}
    grads["x"], dcontext = backward(dy, grads)
    if inputs[2] is not None:
        grads["context"] = dcontext
    return (y, grads), peers.unet(config, params, *inputs, dy)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: ",".join(change) or "base")
def test_every_flag(change):
    config = BASE | change
    ours, theirs = both(config, unet_inputs(config))
    peers.assert_same("U-Net", ours, theirs)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (4, 12), (6, 3), (7, 1)], ids=str)
def test_every_size(size):
    config = BASE | THREE_LEVELS
    ours, theirs = both(config, unet_inputs(config, 3, *size, l=1))
    peers.assert_same("U-Net", ours, theirs)


@given(
    config=unet_configs(),
    n=st.integers(1, 3),
    height=st.integers(2, 8),
    width=st.integers(2, 8),
    l=st.integers(1, 4),
)
def test_any_configuration(config, n, height, width, l):
    ours, theirs = both(config, unet_inputs(config, n, height, width, l))
    peers.assert_same("U-Net", ours, theirs)
    module = UNet2DConditionModel.from_config(config)
    assert UNet(config).shapes() == peers.shapes(module)


@pytest.mark.parametrize("config", [SD15_UNET, {}], ids=["Stable Diffusion 1.5", "defaults"])
def test_names_and_shapes_of_large_models(config):
    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(config)
    shapes = UNet(config).shapes()
    assert shapes == peers.shapes(module)
    if config:
        assert sum(map(math.prod, shapes.values())) == 859_520_964
        assert len(shapes) == 686
