"""Networks and samplers against stored numbers of diffusers and transformers.

So they are checked where those are not installed, too.

tests/golden/make_golden.py made them. tests/parity compares everything, these are a few of it.
"""

import json
from pathlib import Path

import golden_cases as cases
import numpy as np
import pytest
from model_cases import integers, numbers, random_params, unet_inputs

from tinyldm.diffusion import SAMPLERS, Schedule
from tinyldm.models import AutoencoderKL, TextEncoder, UNet

FILE = Path(__file__).with_name("golden") / "golden.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return dict(file)


def assert_golden(golden, model, y, grads, names):
    ours = {"y": y} | {name: grads[name] for name in names}
    expected = {
        key.removeprefix(f"{model}: "): x for key, x in golden.items() if key.startswith(model)
    }
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert ours[name].shape == x.shape, name
        assert abs(ours[name] - x).max() <= 1e-9 * abs(x).max(), name


def test_unet(golden):
    model = UNet(cases.UNET)
    y, backward = model(random_params(model.shapes()), *unet_inputs(cases.UNET))
    grads = {}
    grads["x"], grads["context"] = backward(numbers("dy", 2, 5, 7, 3), grads)
    assert_golden(golden, "unet", y, grads, cases.UNET_GRADIENTS)


def test_encoder(golden):
    model = AutoencoderKL(cases.VAE)
    params = random_params(model.shapes())
    images, noise = numbers("images", 2, 6, 4, 3), numbers("noise", 2, 3, 2, 4)
    y, backward = model.to_latents(params, images, noise)
    grads = {}
    grads["x"] = backward(numbers("dy", 2, 3, 2, 4), grads)
    assert_golden(golden, "to_latents", y, grads, cases.ENCODER_GRADIENTS)


def test_decoder(golden):
    model = AutoencoderKL(cases.VAE)
    params = random_params(model.shapes())
    y, backward = model.from_latents(params, numbers("latents", 2, 3, 2, 4))
    grads = {}
    grads["x"] = backward(numbers("dy", 2, 6, 4, 3), grads)
    assert_golden(golden, "from_latents", y, grads, cases.DECODER_GRADIENTS)


def test_text_encoder(golden):
    model = TextEncoder(cases.TEXT)
    params = random_params(model.shapes())
    y, backward = model(params, integers("ids", cases.TEXT["vocab_size"], 2, 5))
    grads = {}
    backward(numbers("dy", 2, 5, 12), grads)
    assert_golden(golden, "text", y, grads, cases.TEXT_GRADIENTS)


with np.load(FILE) as file:
    CONFIGS = json.loads(str(file["sampler configs"]))


@pytest.mark.parametrize("name", dict.fromkeys(key.partition(",")[0] for key in CONFIGS))
def test_samplers(golden, name):
    """Noise is drawn beforehand, as in the parity tests; the network is a formula."""

    def network(x, t):
        return 0.9 * np.sin(0.7 * x + 0.01 * float(t))

    compared = 0
    for (key, config), expected in zip(CONFIGS.items(), golden["samples"], strict=True):
        sampler, steps, _ = key.split(", ", 2)
        if sampler == name:
            steps = int(steps)
            extra = 1 if name in ("ddim", "ddpm") else 2
            x, *noises = np.random.default_rng(steps).normal(size=(steps + extra, 2, 3))
            options = {"noise": iter(noises).__next__} if SAMPLERS[name].needs_noise else {}
            passed = SAMPLERS[name](network, Schedule(config), x, steps, **options)
            found = np.array([y for y, _ in passed])[[steps // 2, -1]]
            assert abs(found - expected).max() <= 1e-10 * max(1, abs(expected).max()), key
            compared += 1
    assert compared >= 4


def test_the_formula_of_the_weights():
    """If these numbers change, all of the file is wrong and not the networks."""
    expected = [-0.27769296409903665, 0.018459322590023364, 0.7389585590735639]
    np.testing.assert_array_equal(numbers("key", 3), expected)
    assert not numbers("key", 0, 2).size and abs(numbers("key", 10_000)).max() <= 1
