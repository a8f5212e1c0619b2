"""The codebook and VQModel: against plain loops, and every gradient.

The straight-through gradient is not the derivative of what is computed. It is that of z plus a
constant, and in the complex-step derivative what is held constant is: it sees that of a real part.
"""

import math

import numpy as np
import pytest
import reference
from gradients import check
from hypothesis import given
from hypothesis import strategies as st
from model_cases import few, keys, numbers, random_params, used_by, vq_configs
from slow import seldom

from tinyldm.config import ConfigError
from tinyldm.kernels import nearest_codes as kernel
from tinyldm.models import IdentityFirstStage, VQModel
from tinyldm.nn.quantize import codebook_loss, nearest_codes, perplexity, straight_through


@given(n=few, d=st.integers(1, 4), k=st.integers(1, 9), key=keys, block=st.sampled_from([1, 7, 99]))
def test_the_nearest_code_is_that_of_a_plain_loop(n, d, k, key, block):
    z, codebook = numbers(f"{key} z", n, 3, d), numbers(f"{key} codes", k, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK_DISTANCES", block)
        codes = nearest_codes(z, codebook)
    assert codes.shape == (n, 3) and codes.dtype.kind == "i"
    np.testing.assert_array_equal(codes, reference.nearest_codes(z, codebook))


def test_of_equal_codes_one_is_taken():
    codebook = np.array([[5.0, 5], [1, 1], [1, 1]])
    assert set(nearest_codes(np.ones((2, 2)), codebook).tolist()) <= {1, 2}


def test_codes_in_float32_far_from_zero():
    rng = np.random.default_rng(0)
    codebook, z = 100 + 0.01 * rng.normal(size=(64, 4)), 100 + 0.01 * rng.normal(size=(500, 4))
    codebook, z = codebook.astype("float32"), z.astype("float32")
    exact = nearest_codes(z.astype(float), codebook.astype(float))
    assert (nearest_codes(z, codebook) == exact).mean() > 0.99


@given(n=few, d=st.integers(1, 4), k=st.integers(1, 9), key=keys)
def test_quantised_again_nothing_changes(n, d, k, key):
    codebook = numbers(f"{key} codes", k, d)
    z = numbers(f"{key} z", n, 3, d)
    codes = nearest_codes(z, codebook)
    y, straight_back = straight_through(z, codebook, codes)
    np.testing.assert_array_equal(nearest_codes(y, codebook), codes)
    np.testing.assert_allclose(y, codebook[codes], rtol=0, atol=1e-15)
    dy = numbers(f"{key} dy", *y.shape)
    np.testing.assert_array_equal(straight_back(dy), dy)


@given(n=few, d=st.integers(1, 4), k=st.integers(1, 9), key=keys)
def test_a_code_learns_from_all_its_own_vectors_alone(n, d, k, key):
    z, codebook = numbers(f"{key} z", n, 3, d), numbers(f"{key} codes", k, d)
    codes = nearest_codes(z, codebook)
    _, dcodebook = codebook_loss(z, codebook, codes)[1]()
    is_its = np.eye(k)[codes.reshape(-1)]  # (vectors, codes)
    expected = 2 / z.size * is_its.T @ (codebook[codes] - z).reshape(-1, d)
    np.testing.assert_allclose(dcodebook, expected, rtol=0, atol=1e-15)
    assert not dcodebook[~is_its.any(axis=0)].any()


def test_values_and_gradients_by_hand():
    z, codebook = np.array([[0.0, 0], [3, 4]]), np.array([[1.0, 0], [3, 3], [9, 9]])
    codes = nearest_codes(z, codebook)
    assert codes.tolist() == [0, 1]
    y, straight_back = straight_through(z, codebook, codes)
    np.testing.assert_array_equal(y, [[1, 0], [3, 3]])
    dy = np.array([[1.0, 2], [3, 4]])
    np.testing.assert_array_equal(straight_back(dy), dy)
    loss, loss_back = codebook_loss(z, codebook, codes, 0.5)
    assert loss == (1 + 0.5) * (1 + 1) / 4
    dz, dcodebook = loss_back()
    np.testing.assert_array_equal(dz, 0.5 * 2 / 4 * np.array([[-1, 0], [0, 1]]))
    np.testing.assert_array_equal(dcodebook, 2 / 4 * np.array([[1, 0], [0, -1], [0, 0]]))


def test_perplexity():
    assert perplexity(np.zeros((2, 3), int), 5) == 1
    assert math.isclose(perplexity(np.arange(8).reshape(2, 4), 8), 8)
    assert math.isclose(perplexity(np.array([0, 0, 1, 1]), 512), 2)


# -------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("method", ["encode", "decode", "to_latents", "from_latents"])
@seldom
@given(data=st.data(), key=keys)
def test_gradients(method, data, key):
    config = data.draw(vq_configs(levels=st.integers(1, 2), layers=st.just(1)))
    n, h, w = data.draw(st.integers(1, 2)), data.draw(few), data.draw(st.integers(2, 3))
    model = VQModel(config)
    c, f = model.config, model.factor
    params = random_params(model.shapes(), key)
    codebook = {"quantize.embedding.weight": params["quantize.embedding.weight"]}
    if method in ("encode", "to_latents"):
        used = used_by(params, "encoder.", "quant_conv.")
        x = numbers("images", n, h * f, w * f, c.in_channels)
    else:
        used = used_by(params, "decoder.", "post_quant_conv.")
        x = numbers("latents", n, h, w, model.latent_channels)
    check(lambda p, x: getattr(model, method)(codebook | p, x), x, used, method="complex")


@given(n=few, d=st.integers(1, 4), k=st.integers(1, 6), key=keys)
def test_gradients_of_the_codebook(n, d, k, key):
    model = VQModel({"latent_channels": d, "num_vq_embeddings": k, "norm_num_groups": 1})
    params = {"quantize.embedding.weight": numbers(key, k, d)}
    check(model.quantize.loss, numbers(f"{key} z", n, 2, 3, d), params, method="complex")


def test_latents_are_not_quantised_and_images_are_made_of_codes():
    model = VQModel({"latent_channels": 2, "num_vq_embeddings": 4, "norm_num_groups": 1,
                     "block_out_channels": [4], "scaling_factor": 0.5})  # fmt: skip
    params = random_params(model.shapes())
    images = numbers("images", 1, 4, 4, 3)
    z, _ = model.to_latents(params, images)
    np.testing.assert_array_equal(z, model.encode(params, images)[0] * 0.5)
    assert len(np.unique(z.reshape(-1, 2), axis=0)) == 16
    again, _ = model.to_latents(params, images, noise=numbers("noise", 1, 4, 4, 2))
    np.testing.assert_array_equal(again, z)
    codes = params["quantize.embedding.weight"][model.quantize.codes(params, z / 0.5)]
    np.testing.assert_allclose(
        model.from_latents(params, z)[0], model.decode(params, codes)[0], rtol=1e-12
    )


def test_latents_may_have_other_channels_than_the_encoder():
    model = VQModel({"latent_channels": 2, "vq_embed_dim": 5, "norm_num_groups": 1})
    shapes = model.shapes()
    assert shapes["quant_conv.weight"] == (1, 1, 2, 5)
    assert shapes["post_quant_conv.weight"] == (1, 1, 5, 2)
    assert shapes["quantize.embedding.weight"] == (256, 5)
    assert model.latent_channels == 5


@pytest.mark.parametrize("key, value", [("norm_type", "spatial"), ("lookup_from_codebook", True)])
def test_what_is_not_implemented_is_named(key, value):
    with pytest.raises(ConfigError, match=f"vae config: {key} = .* is not implemented"):
        VQModel({key: value})


# ----------------------------------------------------------------------------------------- identity


@given(scale=st.sampled_from([0.5, 1.0, 2.0]), c=st.integers(1, 4), key=keys)
def test_pixels_as_latents(scale, c, key):
    model = IdentityFirstStage({"in_channels": c, "scaling_factor": scale})
    assert model.shapes() == {} and model.factor == 1 and model.latent_channels == c
    x = numbers(key, 2, 3, 4, c)
    z, _ = model.to_latents({}, x)
    np.testing.assert_array_equal(z, x * scale)
    np.testing.assert_allclose(model.from_latents({}, z)[0], x, rtol=1e-12)
    check(model.to_latents, x, {})
    check(model.from_latents, x, {})
