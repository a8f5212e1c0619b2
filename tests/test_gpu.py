"""On a real GPU: every function in float32, and one train step, beside the CPU."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import CONFIG
from strategies import EVERYTHING, random_array

from tinyldm.backend import DeviceError, to_device
from tinyldm.kernels import plain
from tinyldm.models import Tokenizer
from tinyldm.training.networks import Models, denoiser_loss
from tinyldm.training.state import State
from tinyldm.training.step import stage_gradient, train_step

try:
    to_device(np.zeros(1), "cuda")
except DeviceError as error:
    pytest.skip(f"no GPU to test on: {error}", allow_module_level=True)

TOLERANCE = 1e-4  # of the largest element: sums are rounded in another order


def on(device, x):
    return to_device(x, device) if isinstance(x, (np.ndarray, np.generic)) else x


def results(call, device):
    """y and the gradients, back on the host, for a dy that depends on the seed alone."""
    options = {name: on(device, x) for name, x in call.options.items()}
    options = {
        n: x.astype("f4") if getattr(x, "dtype", "") == "f8" else x for n, x in options.items()
    }
    y, backward = call.function(*(on(device, x) for x in call.arrays("float32")), **options)
    dy = np.asarray(random_array(np.random.default_rng(call.seed + 1), y.shape, "float32"))
    gradients = backward(on(device, dy))
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [to_device(x, "cpu") for x in (y, *gradients) if x is not None]


def assert_near(found, expected):
    for x, wanted in zip(found, expected, strict=True):
        assert x.dtype == wanted.dtype and x.shape == wanted.shape
        scale = 1 + np.abs(wanted).max(initial=0)
        assert np.abs(x - wanted).max(initial=0) <= TOLERANCE * scale


@pytest.mark.parametrize("name", EVERYTHING)
@given(data=st.data())
def test_every_function(name, data):
    call = data.draw(EVERYTHING[name])
    expected = results(call, "cpu")
    assert_near(results(call, "cuda"), expected)
    with plain():
        assert_near(results(call, "cuda"), expected)


def test_a_train_step():
    captions = ["a red circle", "a blue square"]
    models = Models(CONFIG, Tokenizer.train(captions, 600, CONFIG.tokens))
    rng = np.random.default_rng(0)
    params = {name: w + rng.normal(0, 0.05, w.shape).astype("f4")
              for name, w in models.init_denoiser(rng).items()}  # fmt: skip
    z, noise = rng.standard_normal((2, 4, *CONFIG.latent_shape), np.float32)
    ids, t = models.tokenizer(captions * 2), rng.integers(0, 1000, 4)
    found = {}
    for device in ("cpu", "cuda"):
        state = State(CONFIG, "denoiser", to_device(params, device), models.tokenizer, "", total=9)
        batch = *(on(device, x) for x in (z, noise, ids)), t
        with stage_gradient(denoiser_loss(models), state, 1, {}) as gradient_of:
            loss, norm = train_step(state, gradient_of, batch, 1e-3, 0.9)
        moved = (to_device(x, "cpu") for x in (state.params.flat, state.average.flat))
        found[device] = float(loss), float(norm), *moved
    np.testing.assert_allclose(found["cuda"][:2], found["cpu"][:2], rtol=1e-4)
    for there, here in zip(found["cuda"][2:], found["cpu"][2:], strict=True):
        # Adam's first step has the length of the rate wherever the sign is certain.
        assert np.mean(np.abs(there - here) > 1e-4) < 0.01
