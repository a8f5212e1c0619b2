"""Every key of the configs that are read: honoured, refused by name, or known to change nothing.

The keys are those of the installed libraries, so a new one fails until it is in one of the tables.
"""

import dataclasses
import inspect

import diffusers
import pytest
from transformers import CLIPTextConfig

from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.scheduler_config import HARMLESS, ONLY, READ
from tinyldm.models import autoencoder, text_encoder, unet, vq

SCHEDULERS = sorted({sampler.scheduler for sampler in SAMPLERS.values()})
NETWORKS = {
    "UNet2DConditionModel": unet,
    "AutoencoderKL": autoencoder,
    "VQModel": vq,
}
HARMLESS_IN_TEXT_ENCODER = {
    "projection_dim": "of the projection after the text encoder, which the U-Net does not see",
    "initializer_range": "of training from nothing",
    "initializer_factor": "of training from nothing",
    "pad_token_id": "the tokenizer pads",
    "bos_token_id": "the tokenizer adds the start",
    "eos_token_id": "finds the token that is pooled, which the U-Net does not see",
}
OF_ANY_MODEL = {  # keys that transformers has in every config, of what a caller is given back
    field.name for field in dataclasses.fields(CLIPTextConfig.__mro__[1])
}


def parameters(kind):
    return set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_key_of_a_scheduler_is_known(name):
    keys = parameters(getattr(diffusers, name))
    refused = {"trained_betas", *ONLY.get(name, {})}
    honoured = (keys & READ.keys()) - refused
    harmless = keys & HARMLESS.keys()
    assert keys == honoured | refused & keys | harmless
    assert len(keys) == len(honoured) + len(refused & keys) + len(harmless)
    print(f"\n{name}: {len(honoured)} honoured, {len(refused & keys)} refused", end="")
    print(f", {len(harmless)} harmless")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_key_of_a_network_is_known(name):
    keys, module = parameters(getattr(diffusers, name)), NETWORKS[name]
    assert keys == module.DEFAULTS.keys() | module.FIXED.keys()
    print(f"\n{name}: {len(module.DEFAULTS)} honoured, {len(module.FIXED)} refused")


def test_every_key_of_the_text_encoder_is_known():
    keys = {field.name for field in dataclasses.fields(CLIPTextConfig)} - OF_ANY_MODEL
    tables = (text_encoder.DEFAULTS, text_encoder.FIXED, HARMLESS_IN_TEXT_ENCODER)
    assert keys == set().union(*tables)
    print("\nCLIPTextConfig: {} honoured, {} refused, {} harmless".format(*map(len, tables)))


@pytest.mark.parametrize("name", NETWORKS)
def test_defaults_are_the_librarys(name):
    module = NETWORKS[name]
    theirs = inspect.signature(getattr(diffusers, name).__init__).parameters
    for key, ours in module.DEFAULTS.items():
        default = theirs[key].default
        assert ours == (list(default) if isinstance(default, tuple) else default), key
    for key, values in module.FIXED.items():
        assert theirs[key].default in values, key
