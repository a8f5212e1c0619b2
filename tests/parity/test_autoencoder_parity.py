"""The autoencoder against diffusers' AutoencoderKL: names, shapes, outputs, every gradient."""

import math

import numpy as np
import peers
import pytest
import torch
from diffusers import AutoencoderKL as TheirAutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given
from hypothesis import strategies as st
from model_cases import SD15_VAE, numbers, random_params, vae_configs

from tinyldm.models import AutoencoderKL
from tinyldm.models.autoencoder import kl_loss, sample_gaussian

BASE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 12],
    "norm_num_groups": 4,
}
CHANGES = [
    {},
    {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"],
     "up_block_types": ["UpDecoderBlock2D"]},
    {"block_out_channels": [4, 12, 8], "down_block_types": ["DownEncoderBlock2D"] * 3,
     "up_block_types": ["UpDecoderBlock2D"] * 3},
    {"layers_per_block": 2},
    {"layers_per_block": 0, "block_out_channels": [8, 8]},
    {"in_channels": 1, "out_channels": 4, "latent_channels": 3},
    {"norm_num_groups": 1},
    {"scaling_factor": 0.36, "shift_factor": 0.12},
    {"use_quant_conv": False},
    {"use_post_quant_conv": False},
    {"mid_block_add_attention": False},
    {"act_fn": "swish", "force_upcast": False},
]  # fmt: skip
METHODS = ["encode", "decode", "to_latents", "from_latents"]


def both(config, method, n=2, height=2, width=3, params=None, noise=None):
    """Output and gradients, ours and theirs; height and width are those of the latents."""
    vae = AutoencoderKL(config)
    c, f = vae.config, vae.factor
    params = params or random_params(vae.shapes())
    x = numbers("images", n, height * f, width * f, c.in_channels)
    if method in ("decode", "from_latents"):
        x = numbers("latents", n, height, width, c.latent_channels)
    options = {} if noise is None else {"noise": noise}
    y, backward = getattr(vae, method)(params, x, **options)
    dy = numbers("dy", *y.shape)
    grads = {}
    grads["x"] = backward(dy, grads)
    return (y, grads), peers.autoencoder(config, params, method, x, dy, noise)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: ",".join(change) or "base")
def test_every_flag(change, method):
    peers.assert_same("autoencoder", *both(BASE | change, method))


@given(
    config=vae_configs(),
    method=st.sampled_from(METHODS),
    n=st.integers(1, 2),
    height=st.integers(1, 4),
    width=st.integers(2, 4),
)
def test_any_configuration(config, method, n, height, width):
    noise = None
    if method == "to_latents":
        noise = 2 * numbers("noise", n, height, width, config["latent_channels"])
    peers.assert_same("autoencoder", *both(config, method, n, height, width, noise=noise))
    module = TheirAutoencoderKL.from_config(config)
    assert AutoencoderKL(config).shapes() == peers.shapes(module)


@pytest.mark.parametrize("use_quant_conv", [True, False])
def test_latents_beyond_the_clamp(use_quant_conv):
    """The four log-variances are above the range, below it, around its upper end, and usual."""
    config = BASE | {"use_quant_conv": use_quant_conv}
    params = random_params(AutoencoderKL(config).shapes())
    bias = "quant_conv.bias" if use_quant_conv else "encoder.conv_out.bias"
    params[bias] = np.array([0, 0, 0, 0, 40, -50, 20, 0.0])
    noise = 2 * numbers("noise", 2, 2, 3, 4)
    peers.assert_same("autoencoder", *both(config, "to_latents", params=params, noise=noise))


@given(n=st.integers(1, 3), c=st.integers(1, 4), spread=st.sampled_from([1, 40]))
def test_the_gaussian(n, c, spread):
    """Draws, divergence and their gradients, element by element, within and beyond the clamp."""
    moments, noise = numbers("moments", n, 2, 3, 2 * c), 2 * numbers("noise", n, 2, 3, c)
    moments[..., c:] *= spread
    dz = numbers("dz", n, 2, 3, c)
    theirs = peers.pixels_to_torch(moments)
    gaussian = DiagonalGaussianDistribution(theirs)

    z, sample_back = sample_gaussian(moments, noise)
    their_z = gaussian.mean + gaussian.std * peers.pixels_to_torch(noise)
    expected = torch.autograd.grad(their_z, theirs, peers.pixels_to_torch(dz), retain_graph=True)[0]
    np.testing.assert_allclose(z, peers.pixels_to_numpy(their_z), 1e-12)
    np.testing.assert_allclose(sample_back(dz), peers.pixels_to_numpy(expected), 1e-12)

    kl, kl_back = kl_loss(moments)
    their_kl = gaussian.kl().mean()
    expected = torch.autograd.grad(their_kl, theirs)[0]
    np.testing.assert_allclose(kl, their_kl.item(), 1e-12)
    np.testing.assert_allclose(kl_back(), peers.pixels_to_numpy(expected), 1e-12, 1e-15)


@pytest.mark.parametrize("config", [SD15_VAE, {}], ids=["Stable Diffusion 1.5", "defaults"])
def test_names_and_shapes_of_large_models(config):
    with torch.device("meta"):
        module = TheirAutoencoderKL.from_config(config)
    shapes = AutoencoderKL(config).shapes()
    assert shapes == peers.shapes(module)
    if config:
        assert sum(map(math.prod, shapes.values())) == 83_653_863
        assert len(shapes) == 248
