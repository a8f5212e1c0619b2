"""Are the gradient checks worth anything? Each fault planted here in the real source is found.

A fault is a small change of text, of the kind that is made by hand: a lost term, a sign, a factor,
a transposed weight, a sum that is not accumulated. The changed file is compiled into a module of
its own, and the gradient check of what was changed must fail on it; on the unchanged text it must
pass. A text that is no longer in the source, or is there twice, is an error, so the table stays
true to the code.
"""

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gradients import check, check_loss, joined
from strategies import random_array, random_params

from tinyldm.kernels import blocking, plain
from tinyldm.kernels.im2col import im2col
from tinyldm.models import AutoencoderKL, VQModel
from tinyldm.nn.layers import Conv2d, Linear
from tinyldm.nn.protocol import KERNELS
from tinyldm.testing import GradientError, diagnosis
from tinyldm.training.losses import autoencoder_loss, squared_error

SMALL = 20  # elements or bytes at a time: several blocks even of small arrays


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """No real kernel stands in for what is planted, and the planted ones cut even small arrays."""
    monkeypatch.setattr(blocking, "BLOCK", SMALL)
    monkeypatch.setattr(diagnosis, "MOST_SECONDS", 0)  # that it is found is enough here
    with plain():
        yield


def plant(name, old="", new=""):
    """The module `name`, compiled from its source with the one `old` in it replaced by `new`."""
    path = Path(importlib.import_module(name).__file__)
    source = path.read_text(encoding="utf-8")
    if old:
        assert source.count(old) == 1, f"{path.name} has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    module = ModuleType(name)
    registered = {twin: list(kernels) for twin, kernels in KERNELS.items()}
    exec(compile(source, str(path), "exec"), module.__dict__)
    for twin, kernels in KERNELS.items():
        kernels[:] = registered.get(twin, [])
    limits = {"LEAST_TILES": 1, "LEAST_COLUMNS": 1}
    sizes = ("BLOCK_BYTES", "WEIGHT_BLOCK_BYTES", "KERNEL_BYTES", "BLOCK_SCORES")
    limits |= dict.fromkeys(sizes, SMALL)
    for limit, value in limits.items():
        if hasattr(module, limit):
            setattr(module, limit, value)
    return module


# --------------------------------------------------------------------------------------- the checks
#
# Each takes a module and checks the gradients of one thing in it. Sizes are equal where unequal
# ones would turn a wrong gradient into an error of shapes, which anyone would notice.


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [random_array(rng, shape) for shape in shapes]


def function(name, *shapes, **options):
    return lambda module: check(partial(getattr(module, name), **options), arrays(*shapes))


def embedding(module):
    ids = np.array([[1, 3, 1], [0, 1, 3]])

    def look_up(table):
        y, embedding_back = module.embedding(ids, table)
        return y, lambda dy: embedding_back(dy)[1]

    check(look_up, arrays((4, 3)))


def losses(module):
    x, target, weight = arrays((3, 4), (3, 4), (3,))
    check(module.mse, [x, target])
    check(lambda x, target: module.mse(x, target, weight), [x, target])


def weighted_mean(module):
    x, weight = arrays((3, 4), (3,))
    check(lambda x: module.weighted_mean(x, weight), [x])


def cross_entropy(module):
    labels = np.array([0, 2, 1, 2])
    check(lambda logits: module.cross_entropy(logits, labels), arrays((4, 3)))


CONVOLUTIONS = {  # kernel, stride, padding
    "conv2d": [(3, 1, (1, 0, 0, 2)), (3, 2, (0, 1, 0, 1)), (1, 1, 0)],
    "im2col": [(3, 1, (1, 0, 0, 2)), (3, 2, (0, 1, 0, 1))],
    "pointwise": [(1, 1, 0)],
}


def convolution(name):
    def check_convolution(module):
        for kernel, stride, padding in CONVOLUTIONS[name]:
            inputs = arrays((2, 5, 4, 3), (kernel, kernel, 3, 3), (3,))
            check(partial(getattr(module, name), stride=stride, padding=padding), inputs)

    return check_convolution


def shared_by_convolutions(module):
    """A convolution whose two ways back are those that the kernels share."""
    padding = (1, 0, 0, 2)

    def conv2d(x, w, b):
        y, conv_back = im2col(x, w, b, padding=padding)

        def backward(dy):
            turned, around = module.turned_kernel(w, padding)
            dx, _ = im2col(dy, turned, padding=around)
            return dx, conv_back(dy)[1], module.bias_gradient(b, dy)

        return y, backward

    check(conv2d, arrays((2, 5, 4, 3), (3, 3, 3, 3), (3,)))


def winograd(module):
    """All three passes, of several blocks of tiles and of one block with several of kernels."""
    for conv2d in module.CONVOLUTIONS.values():
        for shape in ((2, 5, 4, 3), (1, 3, 2, 3)):
            check(partial(conv2d, padding=(1, 0, 0, 2)), arrays(shape, (3, 3, 3, 3), (3,)))


def attentions(module):
    for causal in (False, True):
        shapes = [(2, 6, 6)] * 3
        check(lambda q, k, v, c=causal: module.attention(q, k, v, 2, c), arrays(*shapes))


def layer(make, *shapes):
    """A layer `make(module)` with inputs of these shapes."""

    def check_layer(module):
        made = make(module)
        check(made, arrays(*shapes), random_params(made))

    return check_layer


def used_twice(module):
    """A linear layer that adds up its gradients by the `add_grad` of the module."""
    linear = Linear("a", 3, 3)

    def twice(params, x):
        backs = []
        for _ in range(2):
            x, back = linear(params, x)
            backs.append(back)

        def backward(dy, grads):
            for back in reversed(backs):
                new = {}
                dy = back(dy, new)
                for name, dw in new.items():
                    module.add_grad(grads, name, dw)
            return dy

        return x, backward

    check(twice, arrays((2, 3)), random_params(linear))


def resnet(module):
    for c_in in (4, 2):
        block = module.ResnetBlock("a", c_in, 4, groups=2, eps=1e-5, d_time=3)
        check(block, arrays((2, 3, 3, c_in), (2, 3)), random_params(block))


def attention_block(module):
    own, cross = module.Attention("a", 4, 2), module.Attention("a", 4, 2, d_context=4)
    check(lambda *args: drop_none(own(*args)), arrays((2, 3, 4)), random_params(own))
    check(cross, arrays((2, 3, 4), (2, 3, 4)), random_params(cross))


def drop_none(result):
    """dx alone, of a backward pass that returns (dx, None)."""
    y, backward = result
    return y, lambda dy, grads: backward(dy, grads)[0]


UNET = {
    "in_channels": 2,
    "out_channels": 2,
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "cross_attention_dim": 4,
    "attention_head_dim": 2,
    "freq_shift": 0,
}
PLAIN = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
CROSS = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}


def whole_unet(module):
    """The UNet of a module or, where it has only the levels, a UNet made of these."""
    if hasattr(module, "UNet"):
        return module.UNet
    unet = plant("tinyldm.models.unet")
    for name in ("DownBlock", "UNetLayer", "UpBlock", "run_layers"):
        setattr(unet, name, getattr(module, name))
    return unet.UNet


def unet(context=False, labels=False, levels=1, **config):
    def check_unet(module):
        widths = {"block_out_channels": [4] * levels}
        types = {key: kinds * levels for key, kinds in (CROSS if context else PLAIN).items()}
        model = whole_unet(module)({**UNET, **widths, **types, "mid_block_type": None, **config})
        x, text = arrays((2, 4, 4, 2), (2, 3, 4))
        t, classes = np.array([3, 500]), np.array([1, 0])

        def call(params, x, *text):
            return model(params, x, t, *(text or [None]), classes if labels else None)

        inputs = [x, text] if context or "addition_embed_type" in config else [x]
        check(call, inputs, random_params(model))

    return check_unet


VAE = {
    "block_out_channels": [4, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 2,
    "norm_num_groups": 2,
    "shift_factor": 0.3,
}


def sampled(vae, *inputs, **options):
    """Its loss of images is the mean of z, plus what it adds."""

    def loss_fn(params, images, *noise):
        z, penalty, sample_back = vae.sample(params, images, *noise)

        def backward(grads):
            sample_back(np.full(z.shape, 1 / z.size), 1.0, grads)

        return z.mean() + penalty, backward

    params = random_params(vae)
    params = {n: w for n, w in params.items() if not n.startswith(("decoder", "post_quant"))}
    check_loss(loss_fn, params, {}, inputs, **options)


def gaussian_sample(module):
    sampled(module.AutoencoderKL(VAE), *arrays((1, 4, 4, 3), (1, 2, 2, 2)))


def vq_sample(module):
    vae = module.VQModel({key: x for key, x in VAE.items() if key != "shift_factor"})
    sampled(vae, *arrays((1, 4, 4, 3)), method="complex")


def draw(module):
    vae = module.AutoencoderKL(VAE)
    images, noise = arrays((1, 4, 4, 3), (1, 2, 2, 2))
    check(lambda p, x: vae.draw(p, x, noise), images, used(vae, "encoder", "quant"))


def gaussians(module):
    moments, noise = arrays((2, 3, 2, 4), (2, 3, 2, 2))
    moments[0, 0, 0, 2:] = (-31, 21)  # beyond the clamp
    check(module.kl_loss, moments)
    check(lambda moments: module.sample_gaussian(moments, noise), moments)


TEXT = {
    "vocab_size": 6,
    "hidden_size": 4,
    "intermediate_size": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 4,
}


def text_encoder(module):
    model = module.TextEncoder(TEXT)
    check(model, np.array([[1, 3, 1], [0, 5, 2]]), random_params(model))


CLASSIFIER = {"widths": [4, 4], "norm_num_groups": 2, "classes": {"a": "xy", "b": "xyz"}}


def used(layer, *parts):
    return {name: w for name, w in random_params(layer).items() if name.startswith(parts)}


def coders(module):
    auto = module.Autoencoder(AutoencoderKL(VAE).config, 2, 2, 2)
    check(auto.encode, arrays((1, 4, 4, 3)), used(auto, "encoder.", "quant_conv."))
    check(auto.decode, arrays((1, 2, 2, 2)), used(auto, "decoder.", "post_quant_conv."))
    check(auto.to_latents, arrays((1, 4, 4, 3)), used(auto, "encoder.", "quant_conv."))
    check(auto.from_latents, arrays((1, 2, 2, 2)), used(auto, "decoder.", "post_quant_conv."))


def classifier(module):
    """With the features of two levels, of which one is used for the logits, too."""
    model = module.Classifier(CLASSIFIER)
    check(joined(model), arrays((2, 6, 5, 3)), random_params(model))
    params = used(model, "conv_in.", "blocks.")
    check(joined(model.features), arrays((2, 6, 5, 3)), params)


def vq(module):
    config = {key: value for key, value in VAE.items() if key != "shift_factor"}
    model = module.VQModel(config | {"num_vq_embeddings": 4})
    check(model.quantize.loss, arrays((3, 2)), used(model, "quantize."), method="complex")


def codebook_loss(module):
    codes = np.array([0, 3, 1, 0])
    check(
        lambda z, table: module.codebook_loss(z, table, codes),
        arrays((4, 3), (4, 3)),
        method="complex",
    )


def straight_through(module):
    (codebook,) = arrays((4, 3))
    codes = np.array([0, 3, 1, 0])
    check(lambda z: module.straight_through(z, codebook, codes), arrays((4, 3)), method="complex")


def discriminator(module):
    model = module.PatchDiscriminator("a", 2, 2, groups=2)
    check(model, arrays((1, 16, 16, 2)), random_params(model))


def first_stage_losses(module):
    """The Gaussian one's and the codebook's."""
    vae = AutoencoderKL(VAE)
    images, noise = arrays((1, 4, 4, 3), (1, 2, 2, 2))
    loss_fn = module.autoencoder_loss(vae, 0.1)
    check_loss(loss_fn, random_params(vae), {}, (images, noise))
    vq = VQModel({key: x for key, x in VAE.items() if key != "shift_factor"})
    check_loss(module.autoencoder_loss(vq, 1.0), random_params(vq), {}, (images,), method="complex")


def adversarial(module):
    """The loss of an autoencoder with a discriminator, and that one's own."""
    vae, judge = AutoencoderKL(VAE), Conv2d("judge", 3, 1)
    params, frozen = random_params(vae), random_params(judge)
    images, noise, weight = arrays((1, 4, 4, 3), (1, 2, 2, 2), (1,))
    criterion = module.with_discriminator(squared_error, judge)
    loss_fn = autoencoder_loss(vae, 0.1, criterion)
    check_loss(loss_fn, params, frozen, (images, noise, weight))
    judging = module.discriminator_loss(vae, squared_error, judge)
    check_loss(judging, frozen, params, (images, noise))


def perceptual(module):
    def features(x):
        def backward(dmaps):
            return 2 * x * dmaps[0] + 3 * x * x * dmaps[1]

        return [x * x, x**3], backward

    made, real = arrays((2, 2, 2, 3), (2, 2, 2, 3))
    distance = module.perceptual_loss(features)
    check(lambda made: distance(made, real + 1), made)
    criterion = module.with_perception(module.squared_error, features, 0.7)
    check(lambda made: as_function(criterion({}, made, real + 1)), made)


def as_function(result):
    """A criterion's, with a backward pass that is a function's."""
    loss, backward = result
    return loss, lambda dloss: dloss * backward(None)


CHECKS = {
    "linear": function("linear", (2, 3, 4), (4, 4), (4,)),
    "embedding": embedding,
    "silu": function("silu", (6, 5)),
    "leaky_relu": function("leaky_relu", (6, 5)),
    "quick_gelu": function("quick_gelu", (6, 5)),
    "gelu": function("gelu", (6, 5)),
    "geglu": function("geglu", (6, 8)),
    "group_norm": function("group_norm", (2, 7, 4), (4,), (4,), groups=2, eps=1e-2),
    "group_norm_silu": function("group_norm_silu", (2, 7, 4), (4,), (4,), groups=2, eps=1e-2),
    "offset": function("offset", (2, 3, 3), (4, 3)),
    "layer_norm": function("layer_norm", (6, 5), (5,), (5,), eps=1e-2),
    "unit_norm": function("unit_norm", (6, 5), eps=1e-2),
    "upsample": function("upsample_nearest", (2, 2, 3, 2), size=(3, 5)),
    "mean": function("mean", (2, 3, 4, 2), axes=(1, 2)),
    "concatenate": function("concatenate", (2, 3), (2, 3)),
    "mse": losses,
    "hinge": function("hinge", (4, 5), (4, 5)),
    "weighted_mean": weighted_mean,
    "kl": function("kl_to_standard_normal", (3, 4), (3, 4)),
    "cross_entropy": cross_entropy,
    "conv2d": convolution("conv2d"),
    "im2col": convolution("im2col"),
    "windows": shared_by_convolutions,
    "pointwise": convolution("pointwise"),
    "winograd": winograd,
    "attention": attentions,
    "Linear": layer(lambda m: m.Linear("a", 3, 4), (2, 3)),
    "add_grad": used_twice,
    "ResnetBlock": resnet,
    "Attention": attention_block,
    "TransformerBlock": layer(
        lambda m: m.TransformerBlock("a", 4, 2, d_context=4), (2, 3, 4), (2, 3, 4)
    ),
    "SpatialTransformer": layer(
        lambda m: m.SpatialTransformer("a", 4, 2, 4, groups=2, layers=2), (2, 2, 2, 4), (2, 3, 4)
    ),
    "SpatialAttention": layer(
        lambda m: m.SpatialAttention("a", 4, groups=2, eps=1e-5), (2, 2, 2, 4)
    ),
    "AttentionPool": layer(lambda m: m.AttentionPool("a", 4, 2), (2, 3, 4)),
    "skips": unet(levels=2),
    "skips of one level": unet(layers_per_block=2),
    "middle": unet(context=True, mid_block_type="UNetMidBlock2DCrossAttn"),
    "context": unet(context=True),
    "labels": unet(labels=True, num_class_embeds=3),
    "pooled text": unet(addition_embed_type="text", addition_embed_type_num_heads=2),
    "sample": gaussian_sample,
    "vq sample": vq_sample,
    "draw": draw,
    "gaussians": gaussians,
    "text encoder": text_encoder,
    "coders": coders,
    "classifier": classifier,
    "vq": vq,
    "discriminator": discriminator,
    "first stage": first_stage_losses,
    "adversarial": adversarial,
    "perceptual": perceptual,
    "codebook_loss": codebook_loss,
    "straight_through": straight_through,
}


# --------------------------------------------------------------------------------------- the faults
#
# {module: [(check: what is wrong, old text, new text)]}

FAULTS = {
    "tinyldm.nn.activations": [
        ("silu: sign", "s * (1 + x * (1 - s))", "s * (1 - x * (1 - s))"),
        ("silu: dy lost", "return dy * derivative(x)", "return derivative(x)"),
        ("silu: slope at dy", "return dy * derivative(x)", "return dy * derivative(dy)"),
        (
            "leaky_relu: slope squared",
            "return x * leaky_relu_derivative(x)",
            "return x * leaky_relu_derivative(x) ** 2",
        ),
        ("quick_gelu: factor lost", "silu_derivative(1.702 * x)", "silu_derivative(x)"),
        ("gelu: term lost", "normal_cdf(x) + x * density", "normal_cdf(x)"),
        ("gelu: factor of the density", "1 / math.sqrt(2 * math.pi)", "1 / math.sqrt(math.pi)"),
        ("gelu: exponent of the density", "exp(-0.5 * x * x)", "exp(-1.0 * x * x)"),
        ("geglu: value lost", "gelu_back(dy * value)", "gelu_back(dy)"),
        (
            "geglu: halves swapped",
            "[dy * activated, gelu_back(dy * value)]",
            "[gelu_back(dy * value), dy * activated]",
        ),
    ],
    "tinyldm.kernels.cpu.activations": [
        ("gelu: term lost", "y += cdf\n", "y += 0\n"),
        ("gelu: factor of the density", "1 / math.sqrt(2 * math.pi)", "1 / math.sqrt(math.pi)"),
        ("gelu: exponent of the density", "y *= -0.5\n", "y *= -1\n"),
        ("gelu: slope of another", "_slope(x, normal_cdf(x))", "_slope(x, normal_cdf(-x))"),
        ("geglu: term lost", "slope *= value\n", "slope *= 1\n"),
        ("geglu: value for gate", "(cdf, gate, out=slope)", "(cdf, value, out=slope)"),
        ("geglu: dy lost", "np.multiply(dy_, slope, out=dx_[:, :d])", "dx_[:, :d] = slope"),
        (
            "silu: dy lost",
            "np.multiply(dy_, derivative(x_), out=dx_)",
            "dx_[...] = derivative(x_)",
        ),
        ("silu: slope at dy", "derivative(x_)", "derivative(dy_)"),
    ],
    "tinyldm.kernels.cpu.linear": [
        ("linear: weight transposed in dx", "matmul(dy_rows, w, out", "matmul(dy_rows, w.T, out"),
        ("linear: dw transposed", "dx, dy_rows.T @ x_rows,", "dx, x_rows.T @ dy_rows,"),
        ("linear: db a mean", "else ones @ dy_rows", "else ones @ dy_rows / len(dy_rows)"),
    ],
    "tinyldm.nn.functional": [
        ("offset: a mean", "dtable[:l] = dy.sum(axis=0)", "dtable[:l] = dy.mean(axis=0)"),
        ("offset: rows from the end", "dtable[:l] = dy.sum", "dtable[-l:] = dy.sum"),
        ("linear: weight transposed in dx", "dx = dy @ w\n", "dx = dy @ w.T\n"),
        ("linear: dw transposed", "dx, dy_rows.T @ x_rows,", "dx, x_rows.T @ dy_rows,"),
        ("linear: db a mean", "else dy_rows.sum(axis=0)", "else dy_rows.mean(axis=0)"),
        (
            "embedding: repeated ids do not add up",
            "xp.add.at(dtable, ids.reshape(-1), rows)",
            "dtable[ids.reshape(-1)] = rows",
        ),
        ("upsample: one of four lost", "\n            + quads[:, :, 1, :, 1]", ""),
        (
            "upsample: odd sizes cut at the wrong side",
            "whole[:, :out_h, :out_w] = dy",
            "whole[:, -out_h:, -out_w:] = dy",
        ),
        ("mean: a sum", "dy * (dy.size / math.prod(shape))", "dy"),
        ("concatenate: swapped", "dx, dy = xp.split", "dy, dx = xp.split"),
        ("mse: factor", "(dloss * (2 / x.size))", "(dloss * (1 / x.size))"),
        ("mse: mean over the wrong size", "(dloss * (2 / x.size))", "(dloss * (2 / len(x)))"),
        ("mse: weights lost", "dx = scaled * (dloss", "dx = difference * (dloss"),
        (
            "mse: sign for the target",
            "(2 / x.size))\n        return dx, -dx",
            "(2 / x.size))\n        return dx, dx",
        ),
        (
            "hinge: mean over the wrong size",
            "(-0.5 * dloss / on_real.size)",
            "(-0.5 * dloss / len(on_real))",
        ),
        ("hinge: sign", "(0.5 * dloss / on_fake.size)", "(-0.5 * dloss / on_fake.size)"),
        (
            "hinge: satisfied logits are pushed on",
            "too_low.astype(on_real.dtype) * (-0.5",
            "array_module(on_real).ones_like(on_real) * (-0.5",
        ),
        ("weighted_mean: weights lost", "+ weights * (dloss / x.size)", "+ dloss / x.size"),
        ("weighted_mean: size lost", "weights * (dloss / x.size)", "weights * dloss"),
        ("cross_entropy: the right class forgotten", "dlogits[right] -= 1", "pass"),
        ("cross_entropy: denominator lost", "dlogits = powers / total", "dlogits = 1 * powers"),
        ("cross_entropy: 1/n lost", "dlogits * (dloss / n)", "dlogits * dloss"),
        ("kl: 1/n lost", "return mean * (dloss / n)", "return mean * dloss"),
        ("kl: term lost", "(variance - 1) * (0.5", "variance * (0.5"),
    ],
    "tinyldm.nn.norms": [
        ("group_norm: the mean moves, forgotten", "dx_hat - shift - x_hat", "dx_hat - x_hat"),
        ("group_norm: the variance moves, forgotten", "- shift - x_hat * stretch", "- shift"),
        ("group_norm: 1/√variance lost", "return r * (dx_hat", "return (dx_hat"),
        ("group_norm: scale lost", "(dy * w).reshape(grouped)", "dy.reshape(grouped)"),
        (
            "group_norm: dw of the scaled result",
            "(dy * x_hat).reshape(-1, c)",
            "(dy * x_hat * w).reshape(-1, c)",
        ),
        (
            "group_norm: db a mean",
            "dy.reshape(-1, c).sum(axis=0)",
            "dy.reshape(-1, c).mean(axis=0)",
        ),
        (
            "group_norm_silu: slope lost",
            "norm_back(silu_back(dy), weights",
            "norm_back(dy, weights",
        ),
        ("layer_norm: scale lost", "normalise_back(dy * w)\n", "normalise_back(dy)\n"),
        ("layer_norm: dw a sum of dy", "(dy * x_hat).reshape(-1, d)", "dy.reshape(-1, d)"),
        (
            "unit_norm: the length moves, forgotten",
            "scale * dy - x * (along",
            "scale * dy - 0 * (along",
        ),
        ("unit_norm: sign", "scale * dy - x * (along", "scale * dy + x * (along"),
        ("unit_norm: scale lost in a sum", "keepdims=True) * scale\n", "keepdims=True)\n"),
    ],
    "tinyldm.kernels.cpu.group_norm": [
        ("group_norm: the mean moves, forgotten", "centred += across", "pass"),
        ("group_norm: the variance moves, forgotten", "centred *= along", "centred *= 0"),
        ("group_norm: scale lost in a mean", "group_means(means * w)", "group_means(means)"),
        ("group_norm: mean over the wrong size", "members.T * (1 / size)", "members.T * (1 / c)"),
        (
            "group_norm: rstd lost",
            "np.multiply(dz, scale, out=dx_[:, ps])",
            "np.multiply(dz, w_half, out=dx_[:, ps])",
        ),
        (
            "group_norm: statistics of the last sample for all",
            "x3[ns], dy3[ns], dx[ns], rstd[ns]",
            "x3[ns], dy3[ns], dx[ns], rstd[-1:]",
        ),
        (
            "group_norm: dw of the last sample only",
            "reduce(add, on_free_cores(part, samples, x.size, x))",
            "on_free_cores(part, samples, x.size, x)[-1]",
        ),
        (
            "group_norm: means of the last positions only",
            "half * reduce(add, on_free_cores(moments, cut, x_.size, x))",
            "half * on_free_cores(moments, cut, x_.size, x)[-1]",
        ),
        (
            "group_norm_silu: slope taken before scale and shift",
            "np.multiply(centred, scale, out=h)\n                    h += shift",
            "np.multiply(centred, repeated(half * rstd_, x_), out=h)",
        ),
    ],
    "tinyldm.kernels.cpu.layer_norm": [
        ("layer_norm: scale lost", "along = product @ w_average", "along = product @ average"),
        ("layer_norm: the mean moves, forgotten", "dx_ -= _columns(across, table)", "pass"),
        ("layer_norm: the variance moves less", "along * rstd_**3", "along * rstd_**2"),
        ("layer_norm: dw without the deviation", "rstd_.T @ product", "np.sign(rstd_).T @ product"),
        (
            "layer_norm: dw and db of the last rows only",
            "(sum(z)[0] for z in zip(*parts, strict=True))",
            "(z[-1][0] for z in zip(*parts, strict=True))",
        ),
    ],
    "tinyldm.kernels.cpu.winograd": [
        ("winograd: dw of the last block only", "dkernels += more", "dkernels = more"),
        (
            "winograd: bias forgotten",
            "if b is not None:\n                    add_to_rows(out, b[ks])",
            "if b is not None:\n                    pass",
        ),
        (
            "winograd: bias of the first channels for all",
            "add_to_rows(out, b[ks])",
            "add_to_rows(out, b[:1].repeat(out.shape[-1]))",
        ),
        ("winograd: places of dy reversed", '"doutput": a}', '"doutput": a[::-1]}'),
        ("winograd: places of dw reversed", '"dkernel": g.T', '"dkernel": g[::-1].T'),
        ("winograd: the first kernels for all", "w[..., ks]", "w[..., :1]"),
        (
            "winograd: dy moved where it does not divide",
            "whole[:, :out_h, :out_w] = dy",
            "whole[:, -out_h:, -out_w:] = dy",
        ),
    ],
    "tinyldm.nn.conv": [
        (
            "conv2d: scattered products do not add up",
            "+= dwindows[:, :, :, i, j]",
            "= dwindows[:, :, :, i, j]",
        ),
        (
            "conv2d: padding cut at the wrong sides",
            "dx = dpadded[:, top : top + h, left : left + width]",
            "dx = dpadded[:, bottom : bottom + h, right : right + width]",
        ),
        (
            "conv2d: everything scattered to the top",
            "slice(i, i + stride * out_h, stride)",
            "slice(0, stride * out_h, stride)",
        ),
        ("conv2d: db a mean", "else dy_rows.sum(axis=0)", "else dy_rows.mean(axis=0)"),
        ("conv2d: dw of the result", ".T @ dy_rows).reshape(w.shape)", ".T @ y).reshape(w.shape)"),
    ],
    "tinyldm.kernels.cpu.pointwise": [
        ("pointwise: dw transposed", "(dw.T)[", "(dw)["),
        ("pointwise: db lost", "return dx, dw, db", "return dx, dw, db * 0"),
    ],
    "tinyldm.kernels.windows": [
        ("windows: kernel not turned", "w[::-1, ::-1].swapaxes", "w.swapaxes"),
        ("windows: kernel turned one way", "w[::-1, ::-1].swapaxes", "w[::-1].swapaxes"),
        ("windows: kernel not transposed", ".swapaxes(2, 3)", ""),
        (
            "windows: top and bottom swapped in dx",
            "(kh - 1 - top, kh - 1 - bottom,",
            "(kh - 1 - bottom, kh - 1 - top,",
        ),
        (
            "windows: padding of dx off by one",
            "kw - 1 - left, kw - 1 - right)",
            "kw - left, kw - 2 - right)",
        ),
        (
            "windows: db a mean",
            "ones(len(dy_rows), dy.dtype) @ dy_rows",
            "ones(len(dy_rows), dy.dtype) @ dy_rows / len(dy_rows)",
        ),
    ],
    "tinyldm.kernels.im2col": [
        ("im2col: dw of the last block only", "dw += _rows", "dw = _rows"),
        (
            "im2col: scattered products do not add up",
            "+= products[:, :, :, i, j]",
            "= products[:, :, :, i, j]",
        ),
        (
            "im2col: padding cut at the wrong sides",
            "return padded[:, top : top + h, left : left + width]",
            "return padded[:, bottom : bottom + h, right : right + width]",
        ),
        (
            "im2col: every block scattered to the top",
            "y0, y1 = hs.start * stride + i, (hs.stop - 1) * stride + i + 1",
            "y0, y1 = i, (hs.stop - hs.start - 1) * stride + i + 1",
        ),
    ],
    "tinyldm.nn.attention": [
        ("attention: scale of q lost", "split_heads(q * scale, heads)", "split_heads(q, heads)"),
        ("attention: scale of dq lost", "ds @ k * scale", "ds @ k"),
        (
            "attention: the denominator moves, forgotten",
            "p * (dp - (p * dp).sum(axis=3, keepdims=True))",
            "p * dp",
        ),
        (
            "attention: dk and dv swapped",
            "join_heads(dk), join_heads(dv)",
            "join_heads(dv), join_heads(dk)",
        ),
        ("attention: dy for q", "ds.swapaxes(2, 3) @ q", "ds.swapaxes(2, 3) @ dy"),
        (
            "attention: dv of the scores",
            "dv = p.swapaxes(2, 3) @ dy",
            "dv = scores.swapaxes(2, 3) @ dy",
        ),
    ],
    "tinyldm.kernels.attention": [
        ("attention: scale of q lost", "scaled = q * scale", "scaled = q"),
        ("attention: scale of dq lost", "        dqs *= scale\n", ""),
        (
            "attention: no causal mask on the way back",
            "if causal:\n                    p += _causal_mask(xp, ls, m)\n                xp.exp",
            "xp.exp",
        ),
        (
            "attention: the denominator moves, forgotten",
            "xp.negative(mean, out=dys[..., -1:])",
            "dys[..., -1] = 0",
        ),
        ("attention: denominator lost", "xp.log(total, out=total)", "total *= 0"),
        ("attention: dk of the last block only", "dks[ns, hs] += ds", "dks[ns, hs] = ds"),
        ("attention: dv of the last block only", "dvs[ns, hs] += p", "dvs[ns, hs] = p"),
        ("attention: dk and dv swapped", "in (dqs, dks, dvs))", "in (dqs, dvs, dks))"),
        ("attention: dy for q", "@ queries[ns, hs, ls, :-1]", "@ dys[ns, hs, ls, :-1]"),
    ],
    "tinyldm.nn.layers": [
        ("Linear: bias forgotten", "zip(self.weights, dweights", "zip([self.weight], dweights"),
        (
            "Linear: under another name",
            "add_grad(grads, name, dw)",
            "add_grad(grads, name[:-1], dw)",
        ),
    ],
    "tinyldm.nn.protocol": [
        ("add_grad: the last use only", "grads[name] += dw", "grads[name] = dw"),
        ("add_grad: the first use only", "grads[name] += dw", "pass"),
    ],
    "tinyldm.models.blocks": [
        ("SpatialTransformer: one of two", "else a if b is None else a + b", "else b"),
        (
            "ResnetBlock: gradient around the block lost",
            "dh += dx\n            return dh, dtime",
            "return dh, dtime",
        ),
        ("ResnetBlock: dtime a mean", "dh.sum(axis=(1, 2))", "dh.mean(axis=(1, 2))"),
        ("ResnetBlock: dtime of the output", "time_back(dh.sum", "time_back(dy.sum"),
        (
            "Attention: shared input counted once",
            "dx += dsource\n            return dx, None",
            "return dx, None",
        ),
        (
            "Attention: keys and values swapped",
            "k_back(dk, grads)\n            dsource += v_back(dv, grads)",
            "k_back(dv, grads)\n            dsource += v_back(dk, grads)",
        ),
        ("TransformerBlock: gradient around lost", "dx2 += dy", "pass"),
        ("TransformerBlock: a later gradient", "attn1_back(dx1, grads)", "attn1_back(dx2, grads)"),
        (
            "SpatialTransformer: dcontext of the first block only",
            "dcontext = plus(dcontext, dblock_context)",
            "dcontext = dblock_context",
        ),
        (
            "SpatialTransformer: gradient around lost",
            "dx += dy\n            return dx, dcontext",
            "return dx, dcontext",
        ),
        (
            "SpatialAttention: gradient around lost",
            "dx += dy\n            return dx\n",
            "return dx\n",
        ),
        ("AttentionPool: 1/l lost", "return dx + mean_back(dmean)", "return dx + dmean"),
        (
            "AttentionPool: the mean as a token forgotten",
            "position_back(dmean + q_back(dq, grads), grads)",
            "position_back(q_back(dq, grads), grads)",
        ),
    ],
    "tinyldm.models.levels": [
        ("skips of one level: in reverse", "dskips.insert(0, dskip)", "dskips.append(dskip)"),
        (
            "skips of one level: from the wrong end",
            "layer_back(dy + dskips.pop(), grads)",
            "layer_back(dy + dskips.pop(0), grads)",
        ),
        (
            "skips: one lost after downsampling",
            "dy = down_back(dy + dskips.pop(), grads)",
            "dy = down_back(dy + 0 * dskips.pop(), grads)",
        ),
        ("skips: swapped with the features", "dy, dskip = join_back", "dskip, dy = join_back"),
        (
            "context: of the first layer only",
            "dskips.insert(0, dskip)\n"
            "                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)",
            "dskips.insert(0, dskip)\n                dtime, dcontext = plus(dtime, dt), dc",
        ),
        (
            "skips of one level: dtime of the first layer only",
            "layer_back(dy + dskips.pop(), grads)\n"
            "                dtime, dcontext = plus(dtime, dt),",
            "layer_back(dy + dskips.pop(), grads)\n                dtime, dcontext = dt,",
        ),
        (
            "middle: of its last layer only",
            "dy, dt, dc = layer_back(dy, grads)\n            dtime, dcontext = plus(dtime, dt),",
            "dy, dt, dc = layer_back(dy, grads)\n            dtime, dcontext = plus(None, dt),",
        ),
    ],
    "tinyldm.models.unet": [
        (
            "skips of one level: taken in the wrong order",
            "dskips += reversed(dtaken)",
            "dskips += dtaken",
        ),
        ("skips: first one lost", "in_back(dh + dskips.pop(), grads)", "in_back(dh, grads)"),
        (
            "middle: dtime lost",
            "dh, dt, dc = mid_back(dh, grads)",
            "(dh, _, dc), dt = mid_back(dh, grads), None",
        ),
        (
            "context: of the last block only",
            "dskips += reversed(dtaken)\n"
            "                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)",
            "dskips += reversed(dtaken)\n                dtime, dcontext = plus(dtime, dt), None",
        ),
        ("labels: forgotten", "label_back(dtime, grads)", "pass"),
        (
            "pooled text: dcontext forgotten",
            "return dx, plus(dcontext, time_back(dtime, grads))",
            "time_back(dtime, grads)\n            return dx, dcontext",
        ),
        ("skips: last activation of the time forgotten", "dtime = time_back(dtime)\n", "pass\n"),
        (
            "labels: activation of the time forgotten",
            "back_1(silu_back(back_2(dtime, grads)), grads)",
            "back_1(back_2(dtime, grads), grads)",
        ),
    ],
    "tinyldm.models.autoencoder": [
        ("gaussians: ½ lost", "0.5 * dz * spread * inside", "dz * spread * inside"),
        ("gaussians: clamp forgotten in z", "dz * spread * inside", "dz * spread"),
        ("gaussians: clamp forgotten in KL", "dlogvar * inside]", "dlogvar]"),
        ("gaussians: mean and log-variance swapped", "[dz, dlogvar]", "[dlogvar, dz]"),
        ("sample: KL forgotten", "sample_back(dz) + kl_back(dkl / size)", "sample_back(dz)"),
        ("sample: KL of all latents", "kl_back(dkl / size)", "kl_back(dkl)"),
        ("draw: noise lost", "encode_back(sample_back(dz), grads)", "encode_back(moments, grads)"),
    ],
    "tinyldm.models.coders": [
        (
            "coders: convolution forgotten",
            "dh = quant_back(dfeatures, grads) if self.quant else dfeatures",
            "dh = dfeatures",
        ),
        (
            "coders: second convolution forgotten",
            "return quant_back(dz, grads) if self.post_quant else dz",
            "return dz",
        ),
        (
            "coders: last convolution has no gradient",
            "features_back(conv_back(dimages, grads), grads)",
            "features_back(conv_back(dimages, None), grads)",
        ),
        ("coders: scale lost", "draw_back(dlatents * scale, grads)", "draw_back(dlatents, grads)"),
        (
            "coders: scale upside down",
            "decode_back(dimages, grads) * scale",
            "decode_back(dimages, grads) / scale",
        ),
    ],
    "tinyldm.models.classifier": [
        (
            "classifier: of the last attribute only",
            "dpooled = plus(dpooled, head_back(dy, grads))",
            "dpooled = head_back(dy, grads)",
        ),
        (
            "classifier: of the coarsest level only",
            "dh = plus(dh, dy)",
            "dh = dy if dh is None else dh",
        ),
        ("classifier: block forgotten", "dh = resnet_back(dh, grads)", "pass"),
    ],
    "tinyldm.models.vq": [
        ("vq sample: codebook loss forgotten", "dz + loss_back(dloss, grads)", "dz"),
        ("vq: codebook forgotten", "add_grad(grads, self.weight, dcodebook)", "pass"),
    ],
    "tinyldm.models.discriminator": [
        ("discriminator: first activation forgotten", "first_bend_back(dx)", "dx"),
        (
            "discriminator: activation forgotten",
            "norm_back(bend_back(dx), grads)",
            "norm_back(dx, grads)",
        ),
        ("discriminator: norm forgotten", "norm_back(bend_back(dx), grads)", "bend_back(dx)"),
    ],
    "tinyldm.training.losses": [
        (
            "first stage: penalty has weight 1",
            "sample_back(dz, weight, grads)",
            "sample_back(dz, 1.0, grads)",
        ),
        (
            "first stage: penalty forgotten",
            "sample_back(dz, weight, grads)",
            "sample_back(dz, 0.0, grads)",
        ),
        ("perceptual: channels forgotten", "error_back(c * dloss)", "error_back(dloss)"),
        ("perceptual: weight forgotten", "perceived_back(weight)", "perceived_back()"),
        (
            "perceptual: norm forgotten",
            "norm_back(error_back(c * dloss)[0])",
            "error_back(c * dloss)[0]",
        ),
        (
            "perceptual: gradient of the target",
            "error_back(c * dloss)[0]",
            "error_back(c * dloss)[1]",
        ),
        ("perceptual: error forgotten", "return error_back(grads) + (", "return ("),
    ],
    "tinyldm.training.adversarial": [
        ("adversarial: adversarial part forgotten", " + logits_back(adversarial_back(), None)", ""),
        (
            "adversarial: the discriminator moves too",
            "error_back(grads) + logits_back(adversarial_back(), None)",
            "error_back(grads) + logits_back(adversarial_back(), grads)",
        ),
        ("adversarial: real images forgotten", "real_back(dreal, grads)", "pass"),
        ("adversarial: reconstructions forgotten", "fake_back(dfake, grads)", "pass"),
        (
            "adversarial: real and fake swapped",
            "dreal, dfake = hinge_back()",
            "dfake, dreal = hinge_back()",
        ),
    ],
    "tinyldm.nn.quantize": [
        (
            "codebook_loss: sign",
            "e - z.real, z - e.real",
            "e - z.real, e - z",
        ),
        (
            "codebook_loss: commitment lost",
            "(2 * commitment / z.size) * dloss",
            "(2 / z.size) * dloss",
        ),
        ("codebook_loss: factor", "embedding_back((2 / z.size)", "embedding_back((1 / z.size)"),
        ("straight_through: not straight", "        return dy\n", "        return 2 * dy\n"),
    ],
    "tinyldm.models.text_encoder": [
        ("text encoder: gradient around lost", "dx1 = dy + norm2_back", "dx1 = norm2_back"),
        ("text encoder: a later gradient", "return dx1 + norm1_back", "return dy + norm1_back"),
        ("text encoder: layers in order", "in reversed(layer_backs)", "in layer_backs"),
        (
            "text encoder: tokens forgotten",
            "token_back(position_back(dx, grads), grads)",
            "position_back(dx, grads)",
        ),
    ],
}
TABLE = [(name, *fault) for name, faults in FAULTS.items() for fault in faults]


def checks_of(name):
    """The checks that the faults of this module are tried on."""
    return dict.fromkeys(title.partition(": ")[0] for title, *_ in FAULTS[name])


@pytest.mark.parametrize(
    "name, key", [(name, key) for name in FAULTS for key in checks_of(name)], ids=str
)
def test_the_source_passes(name, key):
    CHECKS[key](plant(name))


@pytest.mark.parametrize("name, title, old, new", TABLE, ids=[title for _, title, *_ in TABLE])
def test_the_fault_is_found(name, title, old, new):
    with pytest.raises(GradientError):
        CHECKS[title.partition(": ")[0]](plant(name, old, new))


def test_every_check_is_used():
    assert {key for name in FAULTS for key in checks_of(name)} == CHECKS.keys()
