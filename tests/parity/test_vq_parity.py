"""VQModel against diffusers': names, outputs, and every gradient, straight through and codebook."""

import numpy as np
import peers
import pytest
from diffusers import VQModel as TheirVQModel
from hypothesis import given
from hypothesis import strategies as st
from model_cases import numbers, random_params, vq_configs

from tinyldm.models import VQModel


def ours(config, params, x, dy, dloss, weights):
    model = VQModel(config)
    codebook, commitment = weights
    h, encode_back = model.encode(params, x)
    loss, loss_back = model.quantize.loss(params, h, commitment / codebook)
    images, decode_back = model.decode(params, h)
    grads = {}
    dh = decode_back(dy, grads) + loss_back(dloss * codebook, grads)
    grads["x"] = encode_back(dh, grads)
    return np.append(images, codebook * loss), grads


def theirs(config, params, x, dy, dloss, legacy):
    module = peers._load(TheirVQModel.from_config(config), params)
    module.quantize.legacy = legacy
    x = peers.pixels_to_torch(x)
    out = module.decode(module.encode(x).latents)
    ((out.sample * peers.pixels_to_torch(dy)).sum() + dloss * out.commit_loss).backward()
    images = np.append(peers.pixels_to_numpy(out.sample), out.commit_loss.item())
    return images, peers._gradients(module, {"x": x})


@pytest.mark.parametrize("legacy", [False, True])
@given(
    config=vq_configs(),
    n=st.integers(1, 2),
    height=st.integers(1, 4),
    width=st.integers(2, 4),
)
def test_any_configuration(legacy, config, n, height, width):
    """`legacy` has the two weights swapped, as the released models were trained."""
    model = VQModel(config)
    params = random_params(model.shapes())
    f, c = model.factor, model.config
    x = numbers("images", n, height * f, width * f, c.in_channels)
    dy = numbers("dy", n, height * f, width * f, c.out_channels)
    weights = (0.25, 1.0) if legacy else (1.0, 0.25)
    assert model.shapes() == peers.shapes(TheirVQModel.from_config(config))
    peers.assert_same(
        "VQ autoencoder",
        ours(config, params, x, dy, 1.7, weights),
        theirs(config, params, x, dy, 1.7, legacy),
    )
