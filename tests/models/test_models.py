"""The networks: every gradient, sizes, what is said about bad configurations and bad inputs.

Every parameter is random here, norms and what starts as zero too, so that no fault can hide behind
a zero or a one. That the networks are those of diffusers is tested in tests/parity and
tests/test_golden.py.
"""

import copy
import math
import tracemalloc
from functools import partial

import numpy as np
import pytest
from gradients import check
from hypothesis import given
from hypothesis import strategies as st
from model_cases import (
    SD15_TEXT,
    SD15_UNET,
    SD15_VAE,
    few,
    integers,
    keys,
    numbers,
    random_params,
    text_configs,
    unet_configs,
    unet_inputs,
    used_by,
    vae_configs,
)
from slow import seldom

from tinyldm.config import ConfigError
from tinyldm.diffusion.loss import diffusion_loss
from tinyldm.diffusion.schedule import Schedule
from tinyldm.models import AutoencoderKL, TextEncoder, UNet, autoencoder, blocks, text_encoder, unet
from tinyldm.models.autoencoder import kl_loss, sample_gaussian
from tinyldm.nn import no_grad
from tinyldm.nn.protocol import Grads
from tinyldm.testing import check_live

UNET = {
    "in_channels": 3,
    "out_channels": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
    "num_class_embeds": 3,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
}
UNCONDITIONAL = {
    "down_block_types": ["DownBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D"] * 2,
    "num_class_embeds": None,
    "addition_embed_type": None,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [4, 4, 8],
    "norm_num_groups": 2,
}
TEXT = {
    "vocab_size": 12,
    "hidden_size": 6,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 5,
}


# -------------------------------------------------------------------------------- gradients: blocks


@st.composite
def grouped(draw):
    """Channels and the number of groups that they divide into.

    A group of one channel would forget what is added to it, and rounding would be all that is
    left of the gradient of a bias before it.
    """
    groups = draw(few)
    return groups * draw(st.integers(2, 3)), groups


@st.composite
def headed(draw):
    """Width and the number of heads that it divides into."""
    heads = draw(few)
    return heads * draw(st.integers(3, 4)), heads


@st.composite
def resnet_blocks(draw):
    (c_in, groups), factor = draw(grouped()), draw(st.integers(1, 2))
    d_time = draw(st.sampled_from([None, 3]))
    n = draw(few)
    layer = blocks.ResnetBlock("r", c_in, factor * c_in, groups, 1e-5, d_time)
    x = numbers("x", n, draw(few), draw(few), c_in)
    return layer, [x, numbers("time", n, d_time) if d_time else None]


@st.composite
def attentions(draw):
    (d, heads), n = draw(headed()), draw(few)
    d_context = draw(st.sampled_from([None, 2, 5]))
    bias, causal = draw(st.booleans()), draw(st.booleans())
    layer = blocks.Attention("a", d, heads, d_context, bias, causal)
    context = numbers("context", n, draw(few), d_context) if d_context else None
    return layer, [numbers("x", n, draw(few), d), context]


@st.composite
def feed_forwards(draw):
    d = draw(few)
    return blocks.FeedForward("f", d), [numbers("x", draw(few), draw(few), d)]


@st.composite
def transformer_blocks(draw):
    (d, heads), n = draw(headed()), draw(few)
    context = numbers("context", n, draw(few), draw(few))
    layer = blocks.TransformerBlock("t", d, heads, context.shape[2])
    return layer, [numbers("x", n, draw(few), d), context]


@st.composite
def spatial_transformers(draw):
    (c, groups), n = draw(grouped()), draw(few)
    context = numbers("context", n, draw(few), draw(few))
    layers, linear = draw(st.integers(1, 2)), draw(st.booleans())
    layer = blocks.SpatialTransformer("s", c, groups, context.shape[2], groups, layers, linear)
    return layer, [numbers("x", n, draw(few), draw(few), c), context]


@st.composite
def spatial_attentions(draw):
    c, groups = draw(grouped())
    layer = blocks.SpatialAttention("s", c, groups, 1e-6)
    return layer, [numbers("x", draw(few), draw(few), draw(few), c)]


@st.composite
def upsamples(draw):
    h, w, c = draw(few), draw(few), draw(few)
    layer = blocks.Upsample("u", c)
    size = draw(st.sampled_from([None, (2 * h, 2 * w - 1), (2 * h - 1, 2 * w)]))
    return layer, [numbers("x", draw(few), h, w, c), size]


@st.composite
def downsamples(draw):
    c, padding = draw(few), draw(st.sampled_from([1, (0, 1, 0, 1)]))
    x = numbers("x", draw(few), 2 * draw(few), 2 * draw(few), c)
    return blocks.downsample("d", c, padding), [x]


@st.composite
def attention_pools(draw):
    d, heads = draw(headed())
    return blocks.AttentionPool("p", d, heads), [numbers("x", draw(few), draw(few), d)]


@st.composite
def text_time_embeddings(draw):
    d, heads = draw(headed())
    layer = blocks.TextTimeEmbedding("e", d, draw(few), heads)
    return layer, [numbers("context", draw(few), draw(few), d)]


BLOCKS = {
    "ResnetBlock": resnet_blocks(),
    "Attention": attentions(),
    "FeedForward": feed_forwards(),
    "TransformerBlock": transformer_blocks(),
    "SpatialTransformer": spatial_transformers(),
    "SpatialAttention": spatial_attentions(),
    "Upsample": upsamples(),
    "downsample": downsamples(),
    "AttentionPool": attention_pools(),
    "TextTimeEmbedding": text_time_embeddings(),
}


def test_every_block_is_checked():
    public = {
        name
        for name, thing in vars(blocks).items()
        if getattr(thing, "__module__", "") == blocks.__name__ and name != "plus"
    }
    assert public == BLOCKS.keys()


@pytest.mark.parametrize("name", BLOCKS)
@given(data=st.data(), key=keys)
def test_gradients_of_blocks(name, data, key):
    layer, inputs = data.draw(BLOCKS[name])
    check(layer, inputs, random_params(layer.shapes(), key))


# -------------------------------------------------------------------------------- gradients: models


@seldom
@given(
    config=unet_configs(levels=st.integers(1, 2), layers=st.just(1)),
    n=st.integers(1, 2),
    height=few,
    width=st.integers(2, 4),
    key=keys,
)
def test_gradients_of_unet(config, n, height, width, key):
    model = UNet(config)
    inputs = unet_inputs(config, n, height, width, l=2)
    check(model, inputs, random_params(model.shapes(), key))


@pytest.mark.slow
def test_gradients_of_deeper_unet():
    """Several layers a block, several transformers a stage: all that has to be added up."""
    config = UNET | {"layers_per_block": [2, 1], "transformer_layers_per_block": [1, 2]}
    model = UNet(config)
    check(model, unet_inputs(config, 1, 3, 2, l=2), random_params(model.shapes()))


@pytest.mark.parametrize("method", ["encode", "decode", "to_latents", "from_latents"])
@seldom
@given(data=st.data(), key=keys)
def test_gradients_of_autoencoder(method, data, key):
    config = data.draw(vae_configs(levels=st.integers(1, 2), layers=st.just(1)))
    n, h, w = data.draw(st.integers(1, 2)), data.draw(few), data.draw(st.integers(2, 3))
    model = AutoencoderKL(config)
    c, f = model.config, model.factor
    params = random_params(model.shapes(), key)
    images, latents = (n, h * f, w * f, c.in_channels), (n, h, w, c.latent_channels)
    if method in ("encode", "to_latents"):
        params = used_by(params, "encoder.", "quant_conv.")
        x = numbers("images", *images)
    else:
        params = used_by(params, "decoder.", "post_quant_conv.")
        x = numbers("latents", *latents)
    options = {}
    if method == "to_latents" and data.draw(st.booleans()):
        options["noise"] = 2 * numbers("noise", *latents)
    check(lambda p, x: getattr(model, method)(p, x, **options), x, params)


@given(config=text_configs(), n=st.integers(1, 2), l=st.integers(1, 4), key=keys)
def test_gradients_of_text_encoder(config, n, l, key):
    model = TextEncoder(config)
    ids = integers(key, config["vocab_size"], n, l)
    check(model, ids, random_params(model.shapes(), key))


@given(n=few, h=few, w=few, c=few, key=keys, spread=st.sampled_from([1, 40]))
def test_gradients_of_the_gaussian(n, h, w, c, key, spread):
    """A spread of 40 puts about half of the log-variances outside −30…20."""
    moments = numbers(f"{key} moments", n, h, w, 2 * c)
    moments[..., c:] *= spread
    noise = 2 * numbers(f"{key} noise", n, h, w, c)
    check(kl_loss, moments)
    check(sample_gaussian, moments)
    check(lambda m: sample_gaussian(m, noise), moments)


@given(n=few, h=few, w=few, c=few, key=keys)
def test_kl_is_the_mean_of_how_much_likelier_z_is(n, h, w, c, key):
    """The logarithm of both densities' ratio; with noise ±1 the mean of a square is exact."""
    moments = 2 * numbers(f"{key} moments", n, h, w, 2 * c)
    logvar, ratios = moments[..., c:], []
    for noise in (-1.0, 1.0):
        z, _ = sample_gaussian(moments, np.full((n, h, w, c), noise))
        ratios.append((0.5 * (z * z - noise**2 - logvar)).sum() / n)
    np.testing.assert_allclose(kl_loss(moments)[0], np.mean(ratios), rtol=1e-12, atol=1e-12)


def test_clamped_log_variances_have_no_gradient():
    logvar = np.array([-31, -30.0000001, -30, 0, 20, 20.0000001, 1e6, -1e6])
    moments = np.concatenate([np.ones((1, 1, 8, 1)), logvar.reshape(1, 1, 8, 1)], axis=3)
    inside = np.array([0, 0, 1, 1, 1, 0, 0, 0], bool)
    kl, kl_back = kl_loss(moments)
    z, sample_back = sample_gaussian(moments, np.ones((1, 1, 8, 1)))
    assert np.isfinite(kl) and np.isfinite(z).all()
    for dmoments in (kl_back(), sample_back(np.ones((1, 1, 8, 1)))):
        slope = dmoments[0, 0, :, 1]
        # (e^logvar − 1) / 2 is 0 at logvar = 0 by itself.
        assert not slope[~inside].any()
        assert slope[[2, 4]].all()
    assert z[0, 0, 6, 0] == 1 + math.exp(10)


def test_without_noise_the_latents_are_the_mean():
    model = AutoencoderKL(VAE | {"scaling_factor": 0.5, "shift_factor": 0.25})
    params = random_params(model.shapes())
    images = numbers("images", 2, 8, 4, 3)
    mean = model.encode(params, images)[0][..., :4]
    latents = model.to_latents(params, images)[0]
    np.testing.assert_array_equal(latents, (mean - 0.25) * 0.5)
    noiseless = model.to_latents(params, images, np.zeros_like(mean))[0]
    np.testing.assert_array_equal(noiseless, latents)
    np.testing.assert_allclose(
        model.from_latents(params, latents)[0], model.decode(params, mean)[0], 1e-12, 1e-12
    )


# ------------------------------------------------------------------------------------- sizes, inits


@pytest.mark.parametrize(
    ("model", "config", "count", "tensors"),
    [
        (UNet, SD15_UNET, 859_520_964, 686),
        (AutoencoderKL, SD15_VAE, 83_653_863, 248),
        (TextEncoder, SD15_TEXT, 123_060_480, 196),
    ],
)
def test_parameter_counts_of_stable_diffusion(model, config, count, tensors):
    tracemalloc.start()
    try:
        shapes = model(config).shapes()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == (count, tensors)
    assert peak < 5e6, "describing a model must not allocate it"


@pytest.mark.parametrize("model", [UNet(UNET), AutoencoderKL(VAE), TextEncoder(TEXT)])
def test_init(model):
    params = model.init(np.random.default_rng(1))
    assert {name: x.shape for name, x in params.items()} == model.shapes()
    assert {x.dtype for x in params.values()} == {np.dtype("float32")}
    again = model.init(np.random.default_rng(1))
    other = model.init(np.random.default_rng(2))
    for name, x in params.items():
        np.testing.assert_array_equal(x, again[name])
        constant = x.min() == x.max()
        assert constant or not np.array_equal(x, other[name])
        if "norm" in name:
            assert (x == name.endswith(".weight")).all()


@given(config=unet_configs(), height=few, width=few)
def test_a_fresh_unet_gives_zero(config, height, width):
    model = UNet(config)
    params = model.init(np.random.default_rng(0))
    y, backward = model(params, *unet_inputs(config, 2, height, width))
    assert y.shape == (2, height, width, config["out_channels"]) and not y.any()
    grads = {}
    backward(np.ones_like(y), grads)
    assert grads.keys() == params.keys()
    assert grads["conv_out.weight"].any(), "the zeros must be able to leave"


@seldom
@given(config=unet_configs(levels=st.integers(1, 2)), seed=st.integers(0, 2**32 - 1))
def test_the_first_loss_of_a_unet_is_the_size_of_the_noise(config, seed):
    """About 1, and exactly that of a prediction of nothing."""
    config |= {"in_channels": 3, "out_channels": 3}
    model = UNet(config)
    params = model.init(np.random.default_rng(0))
    _, t, *others = unet_inputs(config)
    x0, noise = np.random.default_rng(seed).normal(size=(2, 2, 5, 7, 3))
    loss, _ = diffusion_loss(lambda x, t: model(params, x, t, *others), Schedule({}), x0, noise, t)
    assert loss == (noise**2).mean()


def test_unet_takes_every_size():
    config = UNET | {
        "down_block_types": ["DownBlock2D"] * 2 + ["CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D"] * 3,
        "block_out_channels": [4, 4, 4],
    }
    model = UNet(config)
    params = random_params(model.shapes())
    for height in range(1, 10):
        for width in range(1, 10):
            x, *others = unet_inputs(config, 1, height, width)
            y, backward = model(params, x, *others)
            assert y.shape == (1, height, width, 2)
            dx, _ = backward(y, None)
            assert dx.shape == x.shape and np.isfinite(dx).all()


def test_autoencoder_takes_every_multiple_of_its_factor():
    model = AutoencoderKL(VAE)
    params = random_params(model.shapes())
    for height in (4, 8, 12):
        for width in (4, 8, 12):
            moments, _ = model.encode(params, numbers("images", 1, height, width, 3))
            assert moments.shape == (1, height // 4, width // 4, 8)
            images, _ = model.decode(params, moments[..., :4])
            assert images.shape == (1, height, width, 3)


# ----------------------------------------------------------------------------------- configurations

MODELS = {"unet": (UNet, UNET), "vae": (AutoencoderKL, VAE), "text_encoder": (TextEncoder, TEXT)}


def case_id(value):
    """Names a case after the keys that it changes."""
    return ",".join(value) if isinstance(value, dict) else value if isinstance(value, str) else ""


def assert_refused(what, change, *words):
    model, config = MODELS[what]
    with pytest.raises(ConfigError) as caught:
        model(config | change)
    message = str(caught.value)
    assert "\n" not in message
    for word in (what, *words):
        assert word in message


@pytest.mark.parametrize(
    ("what", "key"),
    [(what, key) for what, module in (("unet", unet), ("vae", autoencoder)) for key in module.FIXED]
    + [("text_encoder", key) for key in text_encoder.FIXED],
)
def test_values_that_are_not_implemented_are_refused_by_name(what, key):
    assert_refused(what, {key: "nonsense"}, key, "nonsense")
    assert_refused(what, {key: ["a", "list"]}, key)


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 2}, ["AttnDownBlock2D"]),
        ("unet", {"up_block_types": ["AttnUpBlock2D"] * 2}, ["AttnUpBlock2D"]),
        ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, ["SimpleCrossAttn"]),
        ("unet", {"down_block_types": ["UpBlock2D"] * 2}, ["UpBlock2D"]),
        ("unet", {"up_block_types": ["DownBlock2D"] * 2}, ["DownBlock2D"]),
        ("unet", {"mid_block_type": "DownBlock2D"}, ["DownBlock2D"]),
        ("unet", {"addition_embed_type": "text_time"}, ["addition_embed_type", "text_time"]),
        ("unet", {"downsample_padding": 0}, ["downsample_padding"]),
        ("unet", {"cross_attention_dim": [6, 6]}, ["cross_attention_dim"]),
        ("unet", {"transformer_layers_per_block": [[1], [2]]}, ["transformer_layers_per_block"]),
        ("unet", {"layers_per_block": 0}, ["no layers", "block_out_channels"]),
        ("vae", {"layers_per_block": 0}, ["layers_per_block = 0", "expected all alike"]),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, ["AttnDownEncoderBlock2D"]),
        ("vae", {"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, ["AttnUpDecoderBlock2D"]),
        ("text_encoder", {"hidden_act": "relu"}, ["hidden_act", "relu", "quick_gelu"]),
    ],
    ids=case_id,
)
def test_other_values_that_are_not_implemented(what, change, words):
    assert_refused(what, change, *words)


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("unet", {"norm_group": 4}, ["'norm_group'", "did you mean 'norm_num_groups'?"]),
        ("unet", {"act_fun": "silu"}, ["'act_fun'", "did you mean 'act_fn'?"]),
        ("unet", {"zzz": 1}, ["'zzz'"]),
        ("vae", {"latent_channel": 4}, ["'latent_channel'", "did you mean 'latent_channels'?"]),
    ],
    ids=case_id,
)
def test_unknown_keys(what, change, words):
    assert_refused(what, change, *words)


def test_keys_that_are_ignored():
    """Notes of diffusers, and what a text encoder's file holds beside the network."""
    UNet(UNET | {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0"})
    AutoencoderKL(VAE | {"_name_or_path": "vae"})
    TextEncoder(TEXT | {"architectures": ["CLIPTextModel"], "projection_dim": 768, "dropout": 0.0})


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        *[
            ("unet", {key: [value] * count}, [key, str(count), "2"])
            for count in (1, 3)
            for key, value in (
                ("down_block_types", "DownBlock2D"),
                ("up_block_types", "UpBlock2D"),
                ("layers_per_block", 1),
                ("attention_head_dim", 1),
                ("transformer_layers_per_block", 1),
            )
        ],
        ("vae", {"down_block_types": ["DownEncoderBlock2D"]}, ["down_block_types", "1", "3"]),
        ("vae", {"up_block_types": ["UpDecoderBlock2D"] * 4}, ["up_block_types", "4", "3"]),
    ],
    ids=case_id,
)
def test_lists_of_the_wrong_length(what, change, words):
    assert_refused(what, change, *words)


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("unet", {"attention_head_dim": 3}, ["3 heads"]),
        ("unet", {"addition_embed_type_num_heads": 4}, ["add_embedding", "4 heads"]),
        ("unet", {"norm_num_groups": 3}, ["3 groups"]),
        ("vae", {"norm_num_groups": 3}, ["3 groups"]),
        ("text_encoder", {"num_attention_heads": 4}, ["4 heads"]),
    ],
    ids=case_id,
)
def test_numbers_that_do_not_divide(what, change, words):
    model, config = MODELS[what]
    with pytest.raises(ValueError, match=f"^.*{'.*'.join(words)}.*$"):
        model(config | change)


def test_defaults_are_those_of_stable_diffusion():
    """An empty file means diffusers' defaults: the constructor itself fills them in."""
    assert UNet({}).config.block_out_channels == [320, 640, 1280, 1280]
    assert AutoencoderKL({}).factor == 1
    assert len(TextEncoder({}).layers) == 12


# ------------------------------------------------------------------------------------- wrong inputs

ids = integers("ids", 12, 2, 4)
x, t, context, labels = unet_inputs(UNET)
images = numbers("images", 2, 8, 4, 3)
latents = numbers("latents", 2, 2, 1, 4)


@pytest.mark.parametrize(
    ("change", "inputs", "message"),
    [
        ({}, [x[0], t, context, labels], r"unet: expected x \(n, h, w, 3\)"),
        ({}, [x[..., :2], t, context, labels], r"unet: expected x \(n, h, w, 3\)"),
        ({}, [x, t[:1], context, labels], r"unet: expected t"),
        ({}, [x, t[0], context, labels], r"unet: expected t"),
        ({}, [x, t, None, labels], "unet: .*context"),
        ({}, [x, t, context[..., :5], labels], r"unet: expected context"),
        ({}, [x, t, context[0], labels], r"unet: expected context"),
        ({}, [x, t, context[:1], labels], r"unet: expected context"),
        ({}, [x, t, context, None], "unet: .*labels"),
        ({}, [x, t, context, labels[:1]], "unet: expected labels"),
        ({}, [x, t, context, np.array([0, 3])], ".*(embedding|labels).*3"),
        ({}, [x, t, context, np.array([0, -1])], ".*(embedding|labels).*-1"),
        (UNCONDITIONAL, [x, t, None, labels], "unet: labels"),
        (UNCONDITIONAL | {"mid_block_type": "UNetMidBlock2DCrossAttn"}, [x, t], "unet: .*context"),
    ],
)
def test_wrong_inputs_of_unet(change, inputs, message):
    model = UNet(UNET | change)
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        model(random_params(model.shapes()), *inputs)


@pytest.mark.parametrize(
    ("method", "inputs", "message"),
    [
        ("encode", [images[0]], r"expected .*\(n, h, w, 3\)"),
        ("encode", [images[..., :1]], r"expected .*\(n, h, w, 3\)"),
        ("encode", [images[:, :7]], r"vae: .*multiples of 4, found 7×4.*8×4"),
        ("encode", [images[:, :, :1]], r"vae: .*multiples of 4, found 8×1.*8×4"),
        ("to_latents", [images, latents[:1]], r"expected noise"),
        ("to_latents", [images, latents[..., :1]], r"expected noise"),
        ("decode", [latents[0]], r"expected .*\(n, h, w, 4\)"),
        ("decode", [latents[..., :3]], r"expected .*\(n, h, w, 4\)"),
        ("from_latents", [latents[..., :3]], r"expected .*\(n, h, w, 4\)"),
    ],
)
@pytest.mark.parametrize("quant_convs", [True, False])
def test_wrong_inputs_of_autoencoder(method, inputs, message, quant_convs):
    flags = {"use_quant_conv": quant_convs, "use_post_quant_conv": quant_convs}
    model = AutoencoderKL(VAE | flags)
    with pytest.raises(ValueError, match=f"^.*{message}.*$"):
        getattr(model, method)(random_params(model.shapes()), *inputs)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (integers("ids", 12, 2, 6), "at most 5 tokens, found 6"),
        (ids[0], r"expected .*\(n, l\)"),
        (np.array([[0, 12]]), "12"),
        (np.array([[0, -1]]), "-1"),
        (ids + 0.0, "integers|integer"),
    ],
    ids=["too many", "one row", "too large", "negative", "fractions"],
)
def test_wrong_inputs_of_text_encoder(token_ids, message):
    model = TextEncoder(TEXT)
    with pytest.raises((ValueError, IndexError), match=f"^.*({message}).*$"):
        model(random_params(model.shapes()), token_ids)


# -------------------------------------------------------------------------------- whole-model rules

CALLS = {
    "unet": (UNet(UNET), lambda m, p, *xs: m(p, *xs), [x, t, context, labels]),
    "encode": (AutoencoderKL(VAE), lambda m, p, x: m.encode(p, x), [images]),
    "decode": (AutoencoderKL(VAE), lambda m, p, z: m.decode(p, z), [latents]),
    "to_latents": (AutoencoderKL(VAE), lambda m, p, *xs: m.to_latents(p, *xs), [images, latents]),
    "from_latents": (AutoencoderKL(VAE), lambda m, p, z: m.from_latents(p, z), [latents]),
    "text": (TextEncoder(TEXT), lambda m, p, ids: m(p, ids), [ids]),
}
every_call = pytest.mark.parametrize("name", CALLS)


def run(name, inputs=None, dtype="float64", take=slice(None)):
    """Output, input gradients as a list, parameter gradients; of the samples in `take`."""
    model, call, arrays = CALLS[name]
    params = {n: x.astype(dtype) for n, x in random_params(model.shapes()).items()}
    arrays = [x.astype(dtype) if x.dtype.kind == "f" else x for x in inputs or arrays]
    y, backward = call(model, params, *[x[take] for x in arrays])
    dy = numbers("dy", 2, *y.shape[1:])[take].astype(dtype)
    grads = {}
    dx = backward(dy, grads)
    return y, [d for d in (dx if isinstance(dx, tuple) else (dx,)) if d is not None], grads


@every_call
def test_samples_do_not_meet(name):
    """Permuting a batch permutes the output and its gradients, and a part of it gives a part."""
    y, dxs, grads = run(name)
    turned_y, turned_dxs, turned_grads = run(name, take=slice(None, None, -1))
    np.testing.assert_allclose(turned_y[::-1], y, 1e-10, 1e-12)
    for turned, dx in zip(turned_dxs, dxs, strict=True):
        np.testing.assert_allclose(turned[::-1], dx, 1e-10, 1e-12)
    first, second = run(name, take=slice(0, 1)), run(name, take=slice(1, 2))
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), y, 1e-10, 1e-12)
    largest = max(abs(dw).max() for dw in grads.values())
    assert grads.keys() == turned_grads.keys() == first[2].keys() == second[2].keys()
    for key, dw in grads.items():
        np.testing.assert_allclose(turned_grads[key], dw, 1e-10, 1e-13 * largest)
        np.testing.assert_allclose(first[2][key] + second[2][key], dw, 1e-10, 1e-13 * largest)


@every_call
def test_float32_in_float32_out(name):
    y, dxs, grads = run(name, dtype="float32")
    assert {array.dtype for array in (y, *dxs, *grads.values())} == {np.dtype("float32")}
    exact_y, exact_dxs, exact_grads = run(name)
    for ours, exact in zip([y, *dxs], [exact_y, *exact_dxs], strict=True):
        np.testing.assert_allclose(ours, exact, atol=2e-4 * abs(exact).max())
    largest = max(abs(dw).max() for dw in exact_grads.values())
    for key, dw in grads.items():
        np.testing.assert_allclose(dw, exact_grads[key], 1e-3, 1e-4 * largest)


@every_call
def test_the_same_call_gives_the_same_bits(name):
    y, dxs, grads = run(name, dtype="float32")
    again_y, again_dxs, again_grads = run(name, dtype="float32")
    np.testing.assert_array_equal(y, again_y)
    for dx, again in zip(dxs, again_dxs, strict=True):
        np.testing.assert_array_equal(dx, again)
    for key, dw in grads.items():
        np.testing.assert_array_equal(dw, again_grads[key])


@every_call
def test_gradients_only_where_asked_for(name):
    """None: of the inputs alone. Grads(only): of the named ones. A dict in use: added to it."""
    model, call, arrays = CALLS[name]
    params = random_params(model.shapes())
    y, dxs, grads = run(name)
    dy = numbers("dy", *y.shape)
    some = sorted(grads)[::3]

    def backward(into):
        dx = call(model, params, *arrays)[1](dy, into)
        return [d for d in (dx if isinstance(dx, tuple) else (dx,)) if d is not None]

    limited, twice = Grads(some), {key: dw.copy() for key, dw in grads.items()}
    for into in (None, limited, twice):
        for dx, expected in zip(backward(into), dxs, strict=True):
            np.testing.assert_array_equal(dx, expected)
    assert sorted(limited) == some
    for key in some:
        np.testing.assert_array_equal(limited[key], grads[key])
    for key, dw in grads.items():
        np.testing.assert_array_equal(twice[key], 2 * dw)


@every_call
def test_backward_is_called_once(name):
    model, call, arrays = CALLS[name]
    y, backward = call(model, random_params(model.shapes()), *arrays)
    backward(y, None)
    with pytest.raises(RuntimeError, match="second time"):
        backward(y, None)


@pytest.mark.parametrize("names", [["unet"], ["encode", "decode"], ["text"]], ids=" and ".join)
def test_every_parameter_gets_a_gradient(names):
    live = []
    for name in names:
        model, call, arrays = CALLS[name]
        used = run(name)[2]
        check_live(partial(call, model), arrays, used)
        live += used
    assert sorted(live) == sorted(model.shapes())


@every_call
def test_no_grad_gives_the_same_output(name):
    model, call, arrays = CALLS[name]
    params = random_params(model.shapes())
    with no_grad():
        y, _ = call(model, params, *arrays)
    np.testing.assert_array_equal(y, run(name)[0])


# ------------------------------------------------------------------------------------ checkpointing


NETWORKS = {  # a network, and what it is called with
    "unet": (
        UNet(
            {
                "block_out_channels": [8, 16],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "norm_num_groups": 4,
                "cross_attention_dim": 6,
                "attention_head_dim": 2,
            }
        ),
        (numbers("x", 2, 8, 8, 4), np.array([3, 700]), numbers("context", 2, 3, 6)),
    ),
    "autoencoder": (
        AutoencoderKL(
            {
                "block_out_channels": [8, 16],
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
                "norm_num_groups": 4,
            }
        ).decode,
        (numbers("z", 2, 8, 8, 4),),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_has_the_same_bits_and_holds_less(name):
    """All layers of a U-Net or an autoencoder forget what they can make again."""
    call, inputs = NETWORKS[name]
    network = getattr(call, "__self__", call)
    params = random_params(network.shapes(), name)

    def run(call):
        tracemalloc.start()
        y, backward = call(params, *inputs)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        grads = {}
        return y, backward(np.ones_like(y), grads), grads, held

    y, dx, grads, held = run(call)
    again = copy.deepcopy(network)
    again.recompute()
    assert again.shapes() == network.shapes()
    y2, dx2, grads2, held2 = run(again if call is network else getattr(again, call.__name__))
    assert y.tobytes() == y2.tobytes() and grads.keys() == grads2.keys()
    for one, other in zip(
        [*(dx if isinstance(dx, tuple) else [dx]), *grads.values()],
        [*(dx2 if isinstance(dx2, tuple) else [dx2]), *(grads2[name] for name in grads)],
        strict=True,
    ):
        assert one.tobytes() == other.tobytes()
    assert held2 < 0.4 * held
