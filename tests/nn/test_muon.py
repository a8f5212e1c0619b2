"""Muon: the polynomial on singular values, its step against one by hand, the kernel, the names."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.kernels import plain
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.models import AutoencoderKL, ClassEmbedder, TextEncoder, UNet, VQModel
from tinyldm.nn.optim import ITERATIONS, MOMENTUM, QUINTIC, ema_decay, is_inner, muon, orthogonalise

SHAPES = {"tall": (7, 3), "wide": (2, 5), "alike": (7, 3), "kernel": (3, 1, 2, 7)}
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, params=["kernels", "plain"])
def both(request):
    with plain() if request.param == "plain" else contextlib.nullcontext():
        yield


def random_tensors(seed, dtype="float64"):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 1, shape).astype(dtype) for name, shape in SHAPES.items()}


def by_singular_values(g):
    """Apply the polynomial to each singular value: what `orthogonalise` should give."""
    u, s, v = np.linalg.svd(g, full_matrices=False)
    s = s / (np.linalg.norm(g) + 1e-7)
    for _ in range(ITERATIONS):
        s = QUINTIC[0] * s + QUINTIC[1] * s**3 + QUINTIC[2] * s**5
    return (u * s) @ v


# --------------------------------------------------------------------------------- orthogonal steps


@given(seed=seeds, rows=st.integers(1, 9), columns=st.integers(1, 9), spread=st.floats(0, 3))
def test_the_polynomial_acts_on_the_singular_values_alone(seed, rows, columns, spread):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(rows, columns)) * 10 ** rng.uniform(-spread, spread, columns)
    np.testing.assert_allclose(orthogonalise(g), by_singular_values(g), atol=1e-9)
    np.testing.assert_allclose(orthogonalise(g.T), orthogonalise(g).T, atol=1e-9)
    g /= np.linalg.norm(g)  # the scale drops out but for the 1e-7 beside the norm
    np.testing.assert_allclose(orthogonalise(1e3 * g), orthogonalise(g), atol=1e-6)


def test_singular_values_end_near_one():
    """From a hundredth of the norm on, as the polynomial was chosen for."""
    s = np.append(np.geomspace(0.01, 0.5, 40), 0.5)
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(41, 41)))[0] for _ in range(2))
    g = (u * (s / np.linalg.norm(s))) @ v
    kept = s / np.linalg.norm(s) >= 0.01
    found = np.diag(u.T @ orthogonalise(g) @ v.T)
    assert kept.sum() > 20 and (found[kept] > 0.6).all() and (found < 1.3).all()


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_many_matrices_at_once_are_each_by_itself(shape):
    g = np.random.default_rng(0).normal(size=(3, *shape))
    for one, found in zip(g, orthogonalise(g), strict=True):
        np.testing.assert_allclose(found, orthogonalise(one), atol=1e-12)


def test_no_gradient_gives_no_step():
    np.testing.assert_array_equal(orthogonalise(np.zeros((3, 4))), np.zeros((3, 4)))


# ----------------------------------------------------------------------------------------- the step


@given(
    seed=seeds,
    size=st.floats(1e-4, 1),
    scale=st.floats(1e-3, 1),
    ema=st.floats(0, 1),
    step=st.sampled_from([0, 1, 1000]),
)
def test_a_step_by_hand(seed, size, scale, ema, step):
    params, grads, momentum, average = (random_tensors((seed + i) % 2**32) for i in range(4))
    wanted = {}
    for name, w in params.items():
        rows = w.reshape(-1, w.shape[-1]) if w.ndim == 4 else w
        d_in, d_out = rows.shape if w.ndim == 4 else rows.shape[::-1]
        m = MOMENTUM * momentum[name] + (1 - MOMENTUM) * scale * grads[name]
        ahead = (1 - MOMENTUM) * scale * grads[name] + MOMENTUM * m
        change = by_singular_values(ahead.reshape(rows.shape)) * np.sqrt(max(1, d_out / d_in))
        w = w - size * change.reshape(w.shape)
        keep = ema_decay(step, ema)
        wanted[name] = w, m, keep * average[name] + (1 - keep) * w
    muon(params, grads, momentum, average, step, size, scale, ema)
    for name, arrays in wanted.items():
        found = params[name], momentum[name], average[name]
        for x, expected in zip(found, arrays, strict=True):
            np.testing.assert_allclose(x, expected, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("dtype, tol", [("float32", 1e-5), ("float64", 1e-12)])
@given(seed=seeds)
def test_the_kernel_gives_what_the_plain_function_gives(dtype, tol, seed):
    found = []
    for mode in (contextlib.nullcontext(), plain()):
        params, grads, momentum, average = (random_tensors(seed + i, dtype) for i in range(4))
        params = Flat(params)
        with mode:
            for step in range(3):
                muon(params, grads, momentum, average, step, 0.1, np.float32(0.7), 0.9)
        found.append((params, momentum, average))
    for ours, theirs in zip(*found, strict=True):
        for name in SHAPES:
            assert ours[name].dtype == dtype
            np.testing.assert_allclose(ours[name], theirs[name], rtol=tol, atol=tol)


def test_what_has_no_gradient_stays():
    params, grads, momentum, average = (random_tensors(i) for i in range(4))
    before = {name: w.copy() for name, w in params.items()}
    muon(params, {"tall": grads["tall"]}, momentum, average, 0, 0.1)
    assert [name for name, w in params.items() if (w != before[name]).any()] == ["tall"]


# ---------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize(
    "network",
    [
        UNet({"num_class_embeds": 3, "cross_attention_dim": 8, "block_out_channels": [32] * 4}),
        UNet({"addition_embed_type": "text", "addition_embed_type_num_heads": 4,
              "cross_attention_dim": 8, "block_out_channels": [32] * 4}),
        AutoencoderKL({}),
        VQModel({}),
        TextEncoder({"num_hidden_layers": 1}),
        ClassEmbedder({"num_classes": 4, "hidden_size": 8}),
    ],
    ids=["classes", "pooled", "kl", "vq", "text", "class"],
)  # fmt: skip
def test_matrices_between_features_are_all_inner_and_no_others(network):
    """Not inner: vectors, tables, the pooled text, what touches pixels, latents or noise."""
    for name, shape in network.shapes().items():
        outer = (
            len(shape) == 1
            or "embedding.weight" in name or "add_embedding." in name
            or {3, 4, 8} & set(shape[-2:]) and ("conv_in" in name or "conv_out" in name)
            or "quant_conv" in name
        )  # fmt: skip
        assert is_inner(name, np.empty(shape)) != bool(outer), name
