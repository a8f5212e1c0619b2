"""The text encoder against transformers' CLIPTextModel: names, shapes, outputs, every gradient."""

import math

import peers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import SD15_TEXT, integers, numbers, random_params, text_configs

from tinyldm.models import TextEncoder

BASE = {
    "vocab_size": 12,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 7,
}
CHANGES = [
    {},
    {"hidden_act": "gelu"},
    {"hidden_act": "quick_gelu"},
    {"num_attention_heads": 1},
    {"num_attention_heads": 12},
    {"num_hidden_layers": 4},
    {"intermediate_size": 48},
    {"layer_norm_eps": 0.1},
]


def both(config, n, l):
    text = TextEncoder(config)
    params = random_params(text.shapes())
    ids = integers("ids", config["vocab_size"], n, l)
    y, backward = text(params, ids)
    dy = numbers("dy", *y.shape)
    grads = {}
    assert backward(dy, grads) is None
    return (y, grads), peers.text_encoder(config, params, ids, dy)


@pytest.mark.parametrize("l", [1, 4, 7])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: ",".join(change) or "base")
def test_every_flag(change, l):
    peers.assert_same("text encoder", *both(BASE | change, 3, l))


@given(config=text_configs(), n=st.integers(1, 3), l=st.integers(1, 4))
def test_any_configuration(config, n, l):
    peers.assert_same("text encoder", *both(config, n, l))
    module = peers.text_module(config)
    shapes = peers.shapes(module, peers.text_prefix(module))
    assert TextEncoder(config).shapes() == shapes


@pytest.mark.parametrize("config", [SD15_TEXT, {}], ids=["Stable Diffusion 1.5", "defaults"])
def test_names_and_shapes_of_large_models(config):
    with torch.device("meta"):
        module = peers.text_module(config)
    shapes = TextEncoder(config).shapes()
    assert shapes == peers.shapes(module, peers.text_prefix(module))
    if config:
        assert sum(map(math.prod, shapes.values())) == 123_060_480
        assert len(shapes) == 196
