"""On a real GPU: every function, steps of training as graphs, and sampling, beside the CPU."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_cases import random_params
from small_run import CONFIG
from strategies import EVERYTHING, NATURAL, random_array

from tinyldm.backend import DeviceError, to_device
from tinyldm.kernels import plain
from tinyldm.kernels.cuda.graph import WARM, GraphLeftOut
from tinyldm.models import Tokenizer
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.networks import Models, denoiser_loss
from tinyldm.training.state import State
from tinyldm.training.step import stage_gradient, train_step, value_and_grad

try:
    to_device(np.zeros(1), "cuda")
except DeviceError as error:
    pytest.skip(f"no GPU to test on: {error}", allow_module_level=True)

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}  # of the largest element: sums in another order


def on(device, x):
    return to_device(x, device) if isinstance(x, (np.ndarray, np.generic)) else x


def results(call, device, dtype):
    """y and the gradients, back on the host, for a dy that depends on the seed alone."""
    options = {name: on(device, x) for name, x in call.options.items()}
    options = {
        n: x.astype(dtype) if getattr(x, "dtype", "") == "f8" else x for n, x in options.items()
    }
    y, backward = call.function(*(on(device, x) for x in call.arrays(dtype)), **options)
    dy = np.asarray(random_array(np.random.default_rng(call.seed + 1), y.shape, dtype))
    gradients = backward(on(device, dy))
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [to_device(x, "cpu") for x in (y, *gradients) if x is not None]


def assert_near(found, expected):
    for x, wanted in zip(found, expected, strict=True):
        assert x.dtype == wanted.dtype and x.shape == wanted.shape
        scale = 1 + np.abs(wanted).max(initial=0)
        assert np.abs(x - wanted).max(initial=0) <= TOLERANCE[wanted.dtype.name] * scale


CAPTIONS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def models():
    return Models(CONFIG, Tokenizer.train(CAPTIONS, 600, CONFIG.tokens))


def params_of(models):
    rng = np.random.default_rng(0)
    return {name: w + rng.normal(0, 0.05, w.shape).astype("f4")
            for name, w in models.init_denoiser(rng).items()}  # fmt: skip


def batch_of(models, seed):
    rng = np.random.default_rng(seed)
    z, noise = rng.standard_normal((2, 4, *CONFIG.latent_shape), np.float32)
    return z, noise, models.tokenizer(CAPTIONS * 2), rng.integers(0, 1000, 4)


def test_steps_of_training(models):
    """The third step on is a graph."""
    params, found = params_of(models), {}
    for device in ("cpu", "cuda"):
        state = State(CONFIG, "denoiser", to_device(params, device), models.tokenizer, "", total=9)
        found[device] = []
        with stage_gradient(denoiser_loss(models), state, 1, {}) as gradient_of:
            for state.step in range(6):
                batch = tuple(on(device, x) for x in batch_of(models, state.step))
                loss, norm = train_step(state, gradient_of, batch, 1e-3, 0.9)
                found[device].append((float(loss), float(norm)))
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=2e-3)
    np.testing.assert_allclose(found["cuda"][0], found["cpu"][0], rtol=1e-4)


def test_a_graph_gives_the_bits_of_single_launches(models, recwarn):
    params, loss_fn = to_device(params_of(models), "cuda"), denoiser_loss(models)
    state = State(CONFIG, "denoiser", params, models.tokenizer, "", total=9)
    with stage_gradient(loss_fn, state, 1, {}) as gradient_of:
        for seed in range(WARM + 3):
            batch = tuple(on("cuda", x) for x in batch_of(models, seed))
            loss, grads = gradient_of(batch)
    assert not [one for one in recwarn if one.category is GraphLeftOut]
    expected_loss, expected = value_and_grad(loss_fn, state.params, batch)
    assert float(loss) == float(expected_loss)
    for name, dw in expected.items():
        np.testing.assert_array_equal(grads[name].get(), dw.get())


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("guidance", [1, 3.0])
def test_sampling(guidance, sampler, models, recwarn):
    found = {}
    networks = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text}
    params = {
        name: {key: w.astype("f4") for key, w in random_params(network.shapes()).items()}
        for name, network in networks.items()
    }
    configs = CONFIG.configs(models.tokenizer)
    for device in ("cpu", "cuda"):
        pipeline = Pipeline(configs, to_device(params, device), models.tokenizer)
        asked = pipeline.sampling_params(CAPTIONS, steps=6, guidance=guidance, sampler=sampler)
        *_, (x, _) = pipeline.denoise(asked)
        found[device] = to_device(x, "cpu")
    assert not [one for one in recwarn if one.category is GraphLeftOut]
    scale = np.abs(found["cpu"]).max()
    assert np.abs(found["cuda"] - found["cpu"]).max() < 1e-3 * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", EVERYTHING)
@given(data=st.data())
def test_every_function(name, dtype, data):
    call = data.draw(EVERYTHING[name])
    expected = results(call, "cpu", dtype)
    assert_near(results(call, "cuda", dtype), expected)
    with plain():
        assert_near(results(call, "cuda", dtype), expected)


@pytest.mark.parametrize("call", NATURAL, ids=lambda call: f"{call.function.__name__}-{call.seed}")
def test_functions_at_the_sizes_of_a_small_u_net(call):
    """Compare GPU and CPU at sizes for which a kernel takes many blocks of threads."""
    assert_near(results(call, "cuda", "float32"), results(call, "cpu", "float32"))
