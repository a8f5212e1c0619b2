"""The double of CuPy is as strict as it says, and the library runs on it without waiting once.

What passes here has never seen a GPU. It shows that no array is taken for one of NumPy's, that
nothing is asked of CuPy that CuPy lacks, and that the host never waits for the device in a step.
"""

import ast
import contextlib
import math
import operator
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import strict
from cuda_on_cpu import needs_compiler
from gradients import check, joined
from hypothesis import given
from hypothesis import strategies as st
from model_cases import numbers, random_params, unet_configs, unet_inputs, vae_configs
from PIL import Image
from reference import assert_near
from slow import seldom
from strategies import EVERYTHING, method_for, random_array

import tinyldm
from tinyldm import backend
from tinyldm.data.dataset import Dataset
from tinyldm.kernels import plain
from tinyldm.kernels.cpu import parallel
from tinyldm.models import AutoencoderKL, ClassNames, TextEncoder, Tokenizer, UNet
from tinyldm.models.autoencoder import kl_loss, sample_gaussian
from tinyldm.models.classifier import Classifier
from tinyldm.nn import activations, no_grad, norms, quantize, recompute
from tinyldm.nn import functional as F
from tinyldm.sampling.init_image import Scene
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.config import Config, Stage
from tinyldm.training.latents import conditioner, conditioning_arrays
from tinyldm.training.loop import Steps
from tinyldm.training.losses import autoencoder_loss
from tinyldm.training.metrics import Diverged
from tinyldm.training.networks import Models, denoiser_loss
from tinyldm.training.state import State, load_state, save_state
from tinyldm.training.step import gradient, stage_gradient, train_step, value_and_grad


@pytest.fixture(autouse=True, scope="module")
def erf_of_the_double():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backend.SPECIAL_FUNCTIONS, "strict", "strict")
        yield


def on_device(x):
    """Arrays copied to the device, wherever they are in lists, tuples and dicts."""
    if isinstance(x, dict):
        return {key: on_device(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(on_device, x))
    return strict.asarray(x) if isinstance(x, (np.ndarray, np.generic)) else x


def near(x, expected, tol=1e-12):
    """Everything in `x` is on the device and equals what `expected` has on the host."""
    if isinstance(expected, dict):
        assert x.keys() == expected.keys()
        for name in expected:
            near(x[name], expected[name], tol)
    elif isinstance(expected, (list, tuple)):
        for part, expected_part in zip(x, expected, strict=True):
            near(part, expected_part, tol)
    elif expected is None:
        assert x is None
    else:
        assert type(x) is strict.ndarray
        assert x.dtype == expected.dtype
        assert_near(x.get(), expected, tol)


# ----------------------------------------------------------------------------- the double: refusals


def device(*shape, dtype="float32"):
    return on_device(np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape).astype(dtype))


HOST = np.ones(3, "float32")

REFUSED = {
    "asarray": lambda x: np.asarray(x),
    "array of a list": lambda x: np.array([x, x]),
    "a function of NumPy": lambda x: np.concatenate([x, x]),
    "a reduction of NumPy": lambda x: np.sum(x),
    "a ufunc of NumPy": lambda x: np.exp(x),
    "isfinite of NumPy": lambda x: np.isfinite(x),
    "the buffer protocol": lambda x: memoryview(x),
    "assignment into NumPy": lambda x: HOST.copy().__setitem__(slice(None), x),
    "hash": lambda x: hash(x),
    "index of a sequence": lambda x: [1, 2, 3][x[0].astype("int64")],
    "bound of a slice": lambda x: x[: x[0].astype("int64")],
    "array + NumPy's": lambda x: x + HOST,
    "NumPy's + array": lambda x: HOST + x,
    "NumPy's 0-d": lambda x: x * np.array(2.0),
    "in place": lambda x: operator.iadd(x, HOST),
    "in place into NumPy's": lambda x: operator.iadd(HOST.copy(), x),
    "comparison": lambda x: x > HOST,
    "matrix product": lambda x: x @ HOST,
    "matrix product from NumPy": lambda x: HOST @ x,
    "matrix product with a number": lambda x: x @ 2.0,
    "a list": lambda x: x + [1.0, 2.0, 3.0],
    "None": lambda x: x + None,
    "a text": lambda x: x * "2",
    "assignment of NumPy's": lambda x: x.__setitem__(slice(None), HOST),
    "assignment of a list": lambda x: x.__setitem__(slice(None), [1.0, 2.0, 3.0]),
    "fill": lambda x: x.fill(HOST),
    "a ufunc": lambda x: strict.add(x, HOST),
    "out of a ufunc": lambda x: strict.exp(x, out=HOST.copy()),
    "positional out": lambda x: strict.exp(x, x),
    "out of matmul": lambda x: strict.matmul(x[None], x[:, None], out=np.ones((1, 1), "float32")),
    "dot": lambda x: strict.dot(x, HOST),
    "where": lambda x: strict.where(x > 1, HOST, 0),
    "condition": lambda x: strict.where(HOST > 1, x, 0),
    "concatenate": lambda x: strict.concatenate([x, HOST]),
    "clip": lambda x: strict.clip(x, HOST, 2),
    "zeros_like": lambda x: strict.zeros_like(HOST),
    "empty_like": lambda x: strict.empty_like(HOST),
    "sign of complex": lambda x: strict.sign(x.astype("complex128")),
    "erf of complex": lambda x: strict.erf(x.astype("complex128")),
    "add.at of complex": lambda x: strict.add.at(x.astype("complex128"), x.astype("int32"), x),
    "add.at of int64": lambda x: strict.add.at(x.astype("int64"), x.astype("int64"), x),
    "multiply.at": lambda x: strict.multiply.at(x, on_device(np.array([0])), x[:1]),
    "float64 into int64 in place": lambda x: operator.iadd(x.astype("int64"), 0.5),
    "an option that CuPy lacks": lambda x: x.sum(where=x > 1),
    "an option of a function": lambda x: strict.full((2,), 1, like=x),
    "iteration over a number": lambda x: iter(x[0]),
    "len of a number": lambda x: len(x[0]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    x = device(3)
    with strict.counting() as counts, pytest.raises(TypeError):
        REFUSED[what](x)
    assert counts.synchronisations == 0
    assert x.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["errstate", "linalg", "einsum", "random"])
def test_other_names_are_refused_by_name(name):
    with pytest.raises(AttributeError, match=rf"strict\.{name}: not among the names of CuPy"):
        getattr(strict, name)


@pytest.mark.parametrize("dtype", [object, "U1", "longdouble", "M8[s]"])
def test_dtypes_that_a_gpu_does_not_know(dtype):
    with pytest.raises(ValueError, match="Unsupported dtype"):
        strict.asarray(np.zeros(2, dtype))


def test_faults_that_cupy_would_not_notice():
    x, there = device(3), on_device(np.array([0, 3]))
    with pytest.raises(IndexError, match="out of bounds"):
        x[there]
    with pytest.raises(IndexError, match="out of bounds"):
        strict.add.at(x, there, x[:2])
    with pytest.raises(ValueError, match="writes twice to one place"):
        x[on_device(np.array([0, 1, 0]))] = 7
    with pytest.raises(ValueError, match=r"leads out of \(3,\)"):
        strict.lib.stride_tricks.as_strided(x, (2, 3), (4, 4))
    for dtype in ("float32", "complex128"):
        assert np.isnan(strict.empty((2, 2), dtype).get()).all()
        assert np.isnan(strict.empty_like(x, dtype).get()).all()
    assert strict.empty(2, "int32").tolist() == [2**31 - 1] * 2
    assert strict.empty(2, bool).tolist() == [True] * 2


# ------------------------------------------------------------------------------- the double: counts

WAITS = {
    "get": lambda x: x.get(),
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "complex": lambda x: complex(x[0]),
    "bool": lambda x: bool(x[0]),
    "if": lambda x: None if x[0] > 2 else None,
    "and": lambda x: x[0] and x,
    "max of Python": lambda x: max(x[0], x[1]),
    "in a list": lambda x: x[0] in [x[1]],
    "str": lambda x: str(x),
    "repr": lambda x: repr(x),
    "format": lambda x: f"{x[0]:.3f}",
    "all": lambda x: bool((x > 0).all()),
    "reading a mask": lambda x: x[x > 1],
    "writing a mask": lambda x: x.__setitem__(x > 1, 0),
    "a mask of one axis": lambda x: x[None][:, x > 1],
    "to_device": lambda x: backend.to_device(x, "cpu"),
}


@pytest.mark.parametrize("what", WAITS)
def test_counted(what):
    x = device(3)
    with strict.counting() as counts:
        WAITS[what](x)
        assert counts.synchronisations == 1
    float(x[0])
    assert (counts.synchronisations, counts.uploads) == (1, 0)


def test_nothing_else_is_counted():
    x, added, ids = device(2, 3), device(3, 3), on_device(np.array([1, 0, 1]))
    with strict.counting() as counts:
        assert (x.shape, x.ndim, x.size, len(x), x.dtype) == ((2, 3), 2, 6, 2, "float32")
        assert (x.strides, x.itemsize, x.nbytes) == ((12, 4), 4, 24)
        assert x.flags.c_contiguous and not x.T.flags.c_contiguous
        assert x.dtype != "float64"
        assert [row.shape for row in x] == [(3,), (3,)]
        total = sum(row.sum() for row in x)
        y = strict.where(x > 1, x, -x) ** 2 / total
        y[0] += total
        strict.add.at(y, ids, added)
        y[ids[:2]] = x[ids].max(axis=0)
        y[:, None].fill(0)
    assert (counts.synchronisations, counts.uploads) == (0, 0)


def test_uploads_are_counted():
    x = device(3)
    with strict.counting() as counts:
        assert strict.asarray(x) is x
        copied = HOST.copy()
        y = strict.asarray(copied)
        copied[:] = 0
        x[[0, 1]], x[np.array([0])]
    assert (counts.synchronisations, counts.uploads) == (0, 3)
    assert y.tolist() == [1, 1, 1]


# --------------------------------------------------------------------------- the double: arithmetic


@pytest.mark.parametrize(
    "scalar, dtype",
    [(2.0, "float32"), (2, "float32"), (True, "float32"), (2j, "complex64"),
     (np.float32(2), "float32"), (np.float64(2), "float64"), (np.int64(2), "float64")],
)  # fmt: skip
def test_scalars_promote_as_in_numpy_2(scalar, dtype):
    x = device(3)
    for result in (x * scalar, scalar * x, strict.multiply(x, scalar)):
        assert result.dtype == dtype
        assert np.array_equal(result.get(), np.array([1, 2, 3]) * scalar)


def test_a_number_on_the_device_is_no_scalar():
    x = device(3)
    total = x.sum(dtype="float64")
    assert type(total) is strict.ndarray and total.shape == ()
    assert (x * total).dtype == "float64"
    with pytest.raises(TypeError):
        strict.multiply(x, 2, out=x.astype("int64"))


OPERATORS = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod,
    operator.pow, operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
    operator.iadd, operator.isub, operator.imul, operator.itruediv,
]  # fmt: skip


@pytest.mark.parametrize("function", OPERATORS, ids=lambda f: f.__name__)
def test_operators_are_numpys(function):
    a, b = np.array([[1.0, 2, 3], [4, 5, 6]]), np.array([3.0, 2, 1])
    operands = [(a, b), (a, 2)]
    if not function.__name__.startswith("i"):
        operands.append((2, a))
    for x, y in operands:
        result = function(on_device(x), on_device(y))
        assert type(result) is strict.ndarray
        np.testing.assert_array_equal(result.get(), function(np.copy(x), y), strict=True)


def test_what_is_changed_in_place_is_changed_for_every_view():
    x = device(2, 3)
    row, number, transposed, same = x[1], x[0, 0], x.T, x.reshape(-1)
    row += 1
    number *= 10
    strict.exp(0 * same[1:2], out=same[1:2])
    assert x.tolist() == [[10, 1, 3], [5, 6, 7]]
    assert transposed.tolist() == [[10, 5], [1, 6], [3, 7]]
    z = x.astype("complex128")
    z.real[...] = 0
    assert not z.get().any() and x.get().any()


def test_every_name_is_there():
    for name in strict.NAMES:
        assert hasattr(strict, name), name
    public = {name for name in vars(strict) if not name.startswith("_")}
    own = {"counting", "synchronisations", "uploads", "launches", "erf"}
    own |= {"np", "special", "contextlib", "sys", "SimpleNamespace", "cuda_on_cpu", "cublas"}
    own |= {"CublasOnCpu", "Graph", "MemoryPool", "Stream"}
    assert {name for name in public - own if not name.isupper()} == strict.NAMES


def test_every_name_is_one_of_cupys():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed; a GPU is not needed")
    for name in strict.NAMES:
        assert hasattr(cupy, name), name
    assert not hasattr(cupy, "errstate")
    for name in vars(strict.cuda):
        assert hasattr(cupy.cuda, name), name
    for double, own in ((strict.Stream, cupy.cuda.Stream), (strict.Graph, cupy.cuda.Graph),
                        (strict.MemoryPool, cupy.cuda.MemoryPool)):  # fmt: skip
        for name in vars(double).keys() - {"__module__", "__dict__", "__weakref__", "__doc__"}:
            assert hasattr(own, name) or name == "ptr", name
    for name in vars(strict.ndarray).keys() - {"_host", "__slots__", "__module__"}:
        assert hasattr(cupy.ndarray, name), name
    assert not hasattr(cupy.ndarray, "__imatmul__")
    assert not hasattr(cupy.ndarray, "__index__")


def test_tinyldm_asks_for_no_other_name():
    """Also where no test of this file comes by."""
    asked = set()
    for file in Path(tinyldm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and _is_library(node.value):
                asked.add(node.attr)
    assert {"empty", "add", "lib", "tanh", "clip", "full"} <= asked
    assert asked - {"__name__"} <= strict.NAMES


def _is_library(node):
    """Is it `xp`, `self.xp` or `array_module(x)`?"""
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", "") == "array_module"
    return "xp" in (getattr(node, "id", ""), getattr(node, "attr", ""))


# --------------------------------------------------------------------------------- every function


def test_every_function_is_among_those_called_here():
    here = vars(F) | vars(activations) | vars(norms) | vars(quantize)
    functions = {name for name, f in here.items() if hasattr(f, "__wrapped__") and name[0] != "_"}
    assert functions - {"nearest_codes"} | {"conv2d", "attention"} == EVERYTHING.keys()


def same_on_the_device(function, arrays, options, without_weights=False):
    """Forward and backward, without an upload and without waiting."""
    y, backward = function(*arrays, **options)
    dy = np.asarray(random_array(np.random.default_rng(0), y.shape))
    arrays_there, options_there, dy_there = on_device((tuple(arrays), options, dy))
    with strict.counting() as counts:
        y_there, backward_there = function(*arrays_there, **options_there)
        returned_there = backward_there(dy_there)
    assert (counts.synchronisations, counts.uploads) == (0, 0)
    near(y_there, y)
    near(returned_there, backward(dy))
    near(arrays_there, tuple(arrays), tol=0)


@pytest.mark.parametrize("kernels", ["kernels", "plain"])
@pytest.mark.parametrize("name", EVERYTHING)
@given(data=st.data())
def test_functions(name, kernels, data):
    call = data.draw(EVERYTHING[name])
    with plain() if kernels == "plain" else contextlib.nullcontext():
        same_on_the_device(call.function, call.arrays(), call.options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_without_a_backward_pass(dtype):
    x, t = np.linspace(-7, 7, 29).astype(dtype), np.array([0, 3, 999])
    x_there, t_there = on_device((x, t))
    with strict.counting() as counts:
        cdf = activations.normal_cdf(x_there)
        waves = [F.time_embedding(t_there, d, flip) for d in (6, 7) for flip in (True, False)]
    assert (counts.synchronisations, counts.uploads) == (0, 0)
    near(cdf, activations.normal_cdf(x))
    near(waves, [F.time_embedding(t, d, flip) for d in (6, 7) for flip in (True, False)])


@pytest.mark.parametrize("name", EVERYTHING)
@given(data=st.data())
def test_check_gradients(name, data):
    call = data.draw(EVERYTHING[name])
    function = partial(call.function, **on_device(call.options))
    # CuPy has no erf of complex numbers: there, differences are taken, which have an error bar.
    check(function, on_device(call.arrays()), method=method_for(name), tol=1e-12)


# ------------------------------------------------------------------------------------- the networks


def in_dtype(x, dtype):
    """Real arrays in another dtype, wherever they are in lists, tuples and dicts."""
    if isinstance(x, dict):
        return {key: in_dtype(value, dtype) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [in_dtype(value, dtype) for value in x]
    return x.astype(dtype) if getattr(x, "dtype", None) in ("float32", "float64") else x


def same_network_on_the_device(network, params, inputs, dtype="float64", tol=1e-10):
    """Forward and backward of a network, without an upload and without waiting."""
    params, inputs = in_dtype((params, tuple(inputs)), dtype)
    y, backward = network(params, *inputs)
    dy = random_array(np.random.default_rng(0), y.shape, dtype)
    grads, grads_there = {}, {}
    params_there, inputs_there, dy_there = on_device((params, inputs, dy))
    with strict.counting() as counts:
        y_there, backward_there = network(params_there, *inputs_there)
        returned_there = backward_there(dy_there, grads_there)
        with no_grad():
            again, _ = network(params_there, *inputs_there)
    assert (counts.synchronisations, counts.uploads) == (0, 0)
    near(y_there, y, tol)
    near(again, y, tol)
    near(returned_there, backward(dy, grads), tol)
    near(grads_there, grads, tol)
    near(params_there, params, tol=0)


@seldom
@given(unet_configs(levels=st.integers(1, 2), layers=st.just(1)))
def test_unet(config):
    unet = UNet(config)
    same_network_on_the_device(unet, random_params(unet.shapes()), unet_inputs(config))


@seldom
@given(vae_configs(levels=st.integers(1, 2), layers=st.just(1)))
def test_autoencoder(config):
    vae = AutoencoderKL(config)
    params, factor = random_params(vae.shapes()), vae.factor
    rng = np.random.default_rng(0)
    images = random_array(rng, (2, 2 * factor, 3 * factor, config["in_channels"]))
    z, noise = (random_array(rng, (2, 2, 3, config["latent_channels"])) for _ in range(2))
    same_network_on_the_device(vae.to_latents, params, [images])
    same_network_on_the_device(vae.to_latents, params, [images, noise])
    same_network_on_the_device(vae.from_latents, params, [z])
    same_network_on_the_device(partial(recompute, vae.decode), params, [z])


def test_classifier():
    model = Classifier({"norm_num_groups": 4, "classes": {"a": "xy", "b": "xyz"}})
    images = random_array(np.random.default_rng(0), (2, 9, 8, 3))
    same_network_on_the_device(joined(model), random_params(model.shapes()), [images])


@pytest.mark.parametrize("far", [1, 40])  # where the log-variance is clamped, too
def test_gaussian_of_the_autoencoder(far):
    rng = np.random.default_rng(0)
    moments, noise = far * random_array(rng, (2, 3, 3, 4)), random_array(rng, (2, 3, 3, 2))
    same_on_the_device(sample_gaussian, [moments], {"noise": noise})
    same_on_the_device(sample_gaussian, [moments], {"noise": None})
    same_on_the_device(kl_loss, [moments], {})


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_text_encoder(activation):
    config = {
        "vocab_size": 12, "hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 5, "hidden_act": activation,
    }  # fmt: skip
    text = TextEncoder(config)
    ids = np.random.default_rng(0).integers(0, 12, (3, 4))
    same_network_on_the_device(text, random_params(text.shapes()), [ids])


def test_value_and_grad():
    rng = np.random.default_rng(0)
    params = {"w": random_array(rng, (3, 4)), "b": random_array(rng, (3,))}
    batch = random_array(rng, (5, 4)), random_array(rng, (5, 3))

    def loss_fn(params, x, target):
        y, linear_back = F.linear(x, params["w"], params["b"])
        loss, loss_back = F.mse(y, target)

        def backward(grads):
            dy, _ = loss_back()
            _, grads["w"], grads["b"] = linear_back(dy)

        return loss, backward

    params_there, batch_there = on_device((params, batch))
    with strict.counting() as counts:
        whole = value_and_grad(loss_fn, params_there, batch_there)
        shards = parallel.value_and_grad(loss_fn, params_there, batch_there, shards=3)
    assert (counts.synchronisations, counts.uploads) == (0, 0)
    near(whole, value_and_grad(loss_fn, params, batch))
    near(shards, value_and_grad(loss_fn, params, batch))


# ---------------------------------------------------------------------------- training and sampling

CONFIG = Config(
    side=8, vae_widths=(4, 8), latent_channels=2, unet_widths=(4, 8), unet_attention=(False, True),
    heads=2, groups=2, text_width=4, text_layers=1, tokens=16, vocabulary=560,
    denoiser=Stage(batch=4, rate=1e-3, warmup=1, ema=0.9, steps=2, muon=0.01),
)  # fmt: skip
CAPTIONS = ["a red circle", "a blue square", "a blue circle", "a square"]
FLOAT32 = 1e-5  # the CPU takes other algorithms, and their sums are rounded elsewhere


@pytest.fixture(scope="module")
def models():
    return Models(CONFIG, Tokenizer.train(CAPTIONS, CONFIG.vocabulary, CONFIG.tokens))


def autoencoder_run(models):
    rng = np.random.default_rng(0)
    images, noise = rng.uniform(-1, 1, (4, 8, 8, 3)), rng.normal(size=(4, 4, 4, 2))
    loss_fn = autoencoder_loss(models.vae, CONFIG.kl_weight)
    return loss_fn, random_params(models.vae.shapes()), (images, noise)


def denoiser_run(models, weighting="simple"):
    rng = np.random.default_rng(0)
    z, noise = rng.normal(size=(2, 4, 4, 4, 2))
    t = rng.integers(0, 1000, 4)
    params = random_params(models.unet.shapes() | models.text.shapes())
    batch = z, noise, models.tokenizer(CAPTIONS), t
    models = copy(models)
    models.config = replace(models.config, weighting=weighting)
    return denoiser_loss(models), params, batch


@needs_compiler
@pytest.mark.parametrize("name", ["unet", "encoder", "decoder", "text_encoder"])
def test_networks_in_float32_by_the_kernels_for_a_gpu(name, models):
    rng = np.random.default_rng(0)
    ids = models.tokenizer(CAPTIONS)
    z, context = random_array(rng, (4, 4, 4, 2)), random_array(rng, (4, ids.shape[1], 4))
    network, shapes, inputs = {
        "unet": (models.unet, models.unet.shapes(), [z, np.array([0, 20, 500, 999]), context]),
        "encoder": (models.vae.encode, models.vae.shapes(), [random_array(rng, (2, 8, 8, 3))]),
        "decoder": (models.vae.decode, models.vae.shapes(), [z]),
        "text_encoder": (models.text, models.text.shapes(), [ids]),
    }[name]
    same_network_on_the_device(network, random_params(shapes), inputs, "float32", 3 * FLOAT32)


RUNS = {
    "autoencoder": autoencoder_run,
    "denoiser": denoiser_run,
    "denoiser, min-SNR": partial(denoiser_run, weighting="min-snr"),
}


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=needs_compiler)])
@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_training_never_waits(name, dtype, models):
    """Nor does it send anything: tables of the noise schedule are there from the first step on."""
    loss_fn, params, batch = RUNS[name](models)
    params, batch = in_dtype((params, batch), dtype)
    tol = 1e-8 if dtype == "float64" else 1e-3  # a sign in AdamW or Muon may hang on rounding
    stage = name.partition(",")[0]
    rest = models.tokenizer, "fingerprint"
    state_there = State(CONFIG, stage, on_device(params), *rest)
    state = State(CONFIG, stage, {name: w.copy() for name, w in params.items()}, *rest)
    batch_there = tuple(on_device(batch))
    value_and_grad(loss_fn, state_there.params, batch_there)
    for step in range(2):
        with strict.counting() as counts:
            with gradient(loss_fn, state_there.params) as gradient_there:
                result_there = train_step(state_there, gradient_there, batch_there, 1e-3, ema=0.99)
        assert (counts.synchronisations, counts.uploads) == (0, 0)
        with gradient(loss_fn, state.params) as gradient_here:
            result = train_step(state, gradient_here, batch, 1e-3, ema=0.99)
        near(result_there, result, tol)
        state.step = state_there.step = step + 1
    for part in ("params", "moments", "average"):
        near(getattr(state_there, part), getattr(state, part), tol)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("what", ["loss", "gradient", "discriminator"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_no_finite_number_is_taken_back(what, value, models):
    """The device is not waited for, and the next line of the log says so."""
    _, params, _ = autoencoder_run(models)
    critic = on_device({"critic.weight": np.ones((2, 2))})
    state = State(
        CONFIG,
        "autoencoder",
        on_device(params),
        models.tokenizer,
        "",
        total=40,
        discriminator=critic,
    )
    groups = state.params, state.average, state.discriminator
    groups += *state.moments.values(), *state.discriminator_moments.values()
    said = []
    steps, bad = Steps(state, said.append), on_device({"x": np.array([1.0, value])})["x"]

    def take(spoilt):
        grads = {name: 0.1 * w for name, w in (state.params | state.discriminator).items()}
        loss = grads["critic.weight"].sum()
        if spoilt == "loss":
            loss = loss * bad[1]
        if spoilt:
            name = {"loss": None, "gradient": "encoder.conv_in.bias"}.get(spoilt, "critic.weight")
            grads |= {name: grads[name] * bad[1]} if name else {}
        with strict.counting() as counts:
            steps.add(*train_step(state, lambda batch: (loss, grads), (), 1e-3, ema=0.99))
        assert (counts.synchronisations, counts.uploads) == (0, 0)
        state.step += 1

    take(None)
    before = [group.flat.get().copy() for group in groups]
    take(what)
    for group, old in zip(groups, before, strict=True):
        near(group.flat, old, tol=0)
    assert said == []
    steps.look()
    (line,) = said
    assert line.startswith("  autoencoder 2: left out, as the loss is ") and steps.left_out == 1
    take(None)
    assert (state.params.flat.get() != before[0]).any()
    steps.look()
    assert steps.left_out == 0 and math.isfinite(steps.loss) and len(said) == 1
    for _ in range(10):
        take(what)
    with pytest.raises(Diverged, match="step 13: .* for 10 steps in a row"):
        steps.look()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("first_stage", ["kl", "vq"])
def test_a_step_with_a_discriminator_never_waits(first_stage, dtype, models):
    config = replace(CONFIG, side=16, first_stage=first_stage, adversarial=0.5, groups=1)
    models = Models(config, models.tokenizer)
    params = random_params(models.vae.shapes()), random_params(models.discriminator.shapes())
    batch = random_array(np.random.default_rng(0), (3, 16, 16, 3)), numbers("noise", 3, 8, 8, 2)
    batch = [x.astype(dtype) for x in batch[: 2 if first_stage == "kl" else 1]]
    both, results = [], []
    for put in (on_device, lambda x: x):
        network, critic = (
            {name: put(w.astype(dtype)) for name, w in part.items()} for part in params
        )
        state = State(
            config, "autoencoder", network, models.tokenizer, "", total=0, discriminator=critic
        )
        batch_there, numbers_there = [put(x) for x in batch], {}
        with (
            strict.counting() as counts,
            stage_gradient(
                models.first_stage_loss(), state, 1, numbers_there, processes=1
            ) as gradient_of,
        ):
            results.append(train_step(state, gradient_of, batch_there, 1e-3, ema=0.99))
        assert (counts.synchronisations, counts.uploads) == (0, 0)
        results[-1] = (*results[-1], numbers_there)
        assert {w.dtype.name for w in state.discriminator.values()} == {dtype}
        both.append(state)
    tol = 1e-8 if dtype == "float64" else 1e-3
    near(results[0], results[1], tol)
    for part in ("params", "discriminator", "discriminator_moments"):
        near(getattr(both[0], part), getattr(both[1], part), tol)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_training_keeps_float32(name, models):
    loss_fn, params, batch = RUNS[name](models)
    params = {key: w.astype("float32") for key, w in params.items()}
    batch = [x.astype("float32") if x.dtype == "float64" else x for x in batch]
    loss, grads = value_and_grad(loss_fn, on_device(params), tuple(on_device(batch)))
    assert grads.keys() == params.keys()
    assert {x.dtype.name for x in (loss, *grads.values())} == {"float32"}


def test_a_state_is_saved_from_the_device(tmp_path, models):
    _, params, _ = autoencoder_run(models)
    params = {name: w.astype("float32") for name, w in params.items()}
    state = State(CONFIG, "autoencoder", on_device(params), models.tokenizer, "fingerprint")
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    for part in ("params", "moments", "average"):
        near(getattr(state, part), getattr(loaded, part), tol=0)


def pipeline(models, to=lambda x: x, dtype="float64"):
    params = {
        name: {k: to(w.astype(dtype)) for k, w in random_params(model.shapes()).items()}
        for name, model in (
            ("unet", models.unet), ("vae", models.vae), ("text_encoder", models.text),
        )
    }  # fmt: skip
    configs = {
        "unet": CONFIG.unet_config(),
        "vae": CONFIG.vae_config(),
        "text_encoder": CONFIG.text_config(models.tokenizer),
        "scheduler": CONFIG.scheduler_config(),
    }
    return Pipeline(configs, params, models.tokenizer)


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=needs_compiler)])
@pytest.mark.parametrize("guidance", [1, 3.0])
@pytest.mark.parametrize("sampler, noises", [("ddim", 0), ("ddpm", 3)])
def test_sampling_waits_once_for_the_images(sampler, noises, guidance, dtype, models):
    model, model_there = pipeline(models), pipeline(models, strict.asarray, dtype)
    prompts, options = CAPTIONS[:2], {"steps": 4, "guidance": guidance, "sampler": sampler}
    with strict.counting() as counts:
        path_there = list(model_there.denoise(model_there.sampling_params(prompts, **options)))
    assert counts.synchronisations == 0
    assert counts.uploads == 1 + noises + (1 if guidance == 1 else 2)  # start, noise, token ids
    path = list(model.denoise(model.sampling_params(prompts, **options)))
    near(in_dtype(path_there, dtype), in_dtype(path, dtype), tol=FLOAT32)
    with strict.counting() as counts:
        images_there = model_there(prompts, **options)
    assert counts.synchronisations == 1
    for image_there, image in zip(images_there, model(prompts, **options), strict=True):
        levels = np.int64(image_there) - np.int64(image)
        assert np.abs(levels).max() <= 1 and (levels != 0).mean() < 0.01


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sampling_keeps_float32(sampler, models):
    model = pipeline(models, strict.asarray, "float32")
    recipe = model.sampling_params(CAPTIONS[:2], steps=3, guidance=2.0, sampler=sampler)
    for x, x0 in model.denoise(recipe):
        assert x.dtype == x0.dtype == "float32"


TASKS = {  # what a run is made with, and what its pipeline is given beside a prompt
    "inpainting": {"task": "inpainting"},
    "upscaling": {"task": "upscaling-2"},
    "layout, classes as tokens": {"task": "layout", "condition": "class-token"},
    "inpainting, classes beside the time": {"task": "inpainting", "condition": "class-time"},
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_and_classes_never_wait(name, monkeypatch):
    """From the first latents to a step of training, and on to what the model generates."""
    monkeypatch.setattr(backend, "_cupy", lambda device: strict)
    config = replace(CONFIG, **TASKS[name])
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    captions = ["circle", "square"] * 3
    data = Dataset(images, captions, captions, maps=images[::-1])
    classes = config.has_classes
    tokenizer = ClassNames(captions[:2]) if classes else Tokenizer.train(captions, 560, 16)
    models = Models(config, tokenizer)
    params = random_params(models.unet.shapes() | (models.text.shapes() if models.text else {}))
    vae = random_params(models.vae.shapes())
    found = []
    for to, device in ((on_device, "cuda"), (lambda x: x, "cpu")):
        state = State(
            config, "denoiser", to(params), tokenizer, "", first_stage=to(vae), scaling_factor=0.7
        )
        arrays_of = conditioning_arrays(state, models, data, device)
        rng, chosen = np.random.default_rng(1), np.array([4, 0, 3])
        z, noise = to([rng.normal(size=(3, 4, 4, 2)) for _ in range(2)])
        ids, t = to(tokenizer([captions[i] for i in chosen])), np.array([5, 400, 900])
        batch = z, noise, ids, t, *arrays_of(chosen, rng)
        loss_fn = denoiser_loss(models, conditioner(state, models))
        with strict.counting() as counts, gradient(loss_fn, state.params) as gradient_of:
            result = train_step(state, gradient_of, batch, 1e-3, ema=0.99)
        assert counts.synchronisations == 0
        configs = config.configs(tokenizer)
        networks = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text}
        trained = {**state.params, **state.first_stage}
        weights = {
            part: {w: trained[w] for w in networks[part].shapes()}
            for part in ("unet", "vae", "text_encoder")
            if part in configs
        }
        model = Pipeline(configs, weights, tokenizer, {"task": config.task})
        image = Image.fromarray(images[0])
        mask = image.point(lambda level: 255 * (level > 99)) if "inpainting" in name else None
        recipe = model.sampling_params("circle", steps=2, guidance=2.0)
        scene = Scene.of(image, mask, recipe, model.task)
        found.append((result, list(model.denoise(recipe, None, scene))))
    near(found[0], found[1], tol=1e-4)


def test_latents_and_images_of_the_user(models):
    model, model_there = pipeline(models), pipeline(models, strict.asarray)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 4, 4, 2), dtype="float32")
    images = rng.integers(0, 256, (3, 8, 8, 3), dtype="uint8")
    last_there, last = (
        list(p.denoise(p.sampling_params("a red circle", steps=2), latents))
        for p in (model_there, model)
    )
    near(last_there, last, tol=FLOAT32)
    with strict.counting() as counts:
        encoded = model_there.encode(images)
        decoded = model_there.decode(encoded)
    assert (counts.synchronisations, counts.uploads) == (1, 1)
    near(encoded, model.encode(images), tol=FLOAT32)
    assert np.abs(np.int64(decoded) - model.decode(model.encode(images))).max() <= 1


def test_a_pipeline_is_saved_from_the_device(tmp_path, models):
    model = pipeline(models, strict.asarray, "float32")
    model.save(tmp_path)
    loaded = Pipeline.load(tmp_path)
    near(model.params, loaded.params, tol=0)
