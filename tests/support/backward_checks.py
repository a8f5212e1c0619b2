"""Checks of the gradients of one module each, also of a module that was compiled from other source.

Faults are planted in a module's source, and its checks must fail. Sizes are equal where unequal
ones would turn a wrong gradient into an error of shapes, which anyone would notice.
"""

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
from cuda_calls import examples, of_twin, plain_twin, results
from cuda_on_cpu import COMPILER
from gradients import check, check_loss, joined
from strategies import CUDA_CALLS, random_array, random_params

from tinyldm.kernels.im2col import im2col
from tinyldm.models import AutoencoderKL, VQModel
from tinyldm.nn.layers import Conv2d, Linear
from tinyldm.nn.protocol import KERNELS
from tinyldm.training.adversarial import OF_ADVERSARIAL, OF_ERROR
from tinyldm.training.losses import autoencoder_loss, squared_error

SMALL = 20  # elements or bytes at a time: several blocks even of small arrays


def source_of(name):
    """The file of a module, and its text."""
    path = Path(importlib.import_module(name).__file__)
    return path, path.read_text(encoding="utf-8")


def plant(name, changed=None):
    """The module `name`, compiled from its source, or from a changed text or syntax tree of it."""
    path, source = source_of(name)
    source = source if changed is None else changed
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
# Each takes a module and checks the gradients of one thing in it.


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [random_array(rng, shape) for shape in shapes]


def function(name, *shapes, **options):
    """The check of a function of arrays of these shapes."""

    def check_function(module):
        f, inputs = partial(getattr(module, name), **options), arrays(*shapes)
        check(f, inputs)
        check_other_calls(f, inputs)

    return check_function


def check_other_calls(f, inputs, weights=True):
    """Without weights there are no gradients of them; and dloss, of a loss, is 1 by default."""
    y, backward = f(*inputs)
    whole = as_tuple(backward(np.ones_like(y)))
    if np.ndim(y) == 0:
        assert_equal(as_tuple(f(*inputs)[1]()), whole)
    if weights:
        try:
            alone = f(*inputs)[1](np.ones_like(y), weights=False)
        except TypeError:  # it has none
            return
        assert_equal(alone, [whole[0], *(None for _ in whole[1:])])


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def assert_equal(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def embedding(module):
    ids = np.array([[1, 3, 1], [0, 1, 3]])

    def look_up(table):
        y, embedding_back = module.embedding(ids, table)
        return y, lambda dy: embedding_back(dy)[1]

    check(look_up, arrays((4, 3)))
    check_other_calls(partial(module.embedding, ids), arrays((4, 3)))


def losses(module):
    x, target, weight = arrays((3, 4), (3, 4), (3,))
    for f in (module.mse, lambda x, target: module.mse(x, target, weight)):
        check(f, [x, target])
        check_other_calls(f, [x, target])


def weighted_mean(module):
    x, weight = arrays((3, 4), (3,))
    check(lambda x: module.weighted_mean(x, weight), [x])
    check_other_calls(lambda x: module.weighted_mean(x, weight), [x])


def cross_entropy(module):
    labels = np.array([0, 2, 1, 2])
    check(lambda logits: module.cross_entropy(logits, labels), arrays((4, 3)))
    check_other_calls(lambda logits: module.cross_entropy(logits, labels), arrays((4, 3)))


CONVOLUTIONS = {  # kernel, stride, padding
    "conv2d": [((3, 2), 1, (1, 0, 2, 1)), ((2, 3), 2, (1, 1, 2, 1)), ((1, 1), 1, 0)],
    "im2col": [((3, 2), 1, (1, 0, 2, 1)), ((2, 3), 2, (1, 1, 2, 1))],
    "pointwise": [((1, 1), 1, 0)],
}


def convolution(name):
    def check_convolution(module):
        for kernel, stride, padding in CONVOLUTIONS[name]:
            inputs = arrays((2, 5, 4, 3), (*kernel, 3, 3), (3,))
            f = partial(getattr(module, name), stride=stride, padding=padding)
            check(f, inputs)
            check_other_calls(f, inputs)

    return check_convolution


def shared_by_convolutions(module):
    """A convolution whose two ways back are those that the kernels share."""

    def conv2d(x, w, b, padding):
        y, conv_back = im2col(x, w, b, padding=padding)

        def backward(dy):
            turned, around = module.turned_kernel(w, padding)
            dx, _ = im2col(dy, turned, padding=around)
            return dx, conv_back(dy)[1], module.bias_gradient(b, dy)

        return y, backward

    for padding in ((1, 0, 0, 2), (2, 2, 2, 2)):
        f = partial(conv2d, padding=padding)
        check(f, arrays((2, 5, 4, 3), (3, 3, 3, 3), (3,)))


def winograd(module):
    """All three passes, of several blocks of tiles and of one block with several of kernels."""
    for conv2d in module.CONVOLUTIONS.values():
        for shape in ((2, 5, 4, 3), (1, 3, 2, 3), (2, 8, 9, 3)):
            inputs = arrays(shape, (3, 3, 3, 3), (3,))
            f = partial(conv2d, padding=(1, 0, 0, 2))
            check(f, inputs)
            check_other_calls(f, inputs)


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
    check_other_calls(module.kl_loss, [moments])
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
    def loss(z, table):
        return module.codebook_loss(z, table, np.array([0, 3, 1, 0]))

    check(loss, arrays((4, 3), (4, 3)), method="complex")
    check_other_calls(loss, arrays((4, 3), (4, 3)))


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
    grads = {}
    judging(params | frozen, images, noise)[1](grads)
    assert grads[OF_ERROR].any() and grads[OF_ADVERSARIAL].any()


def upsample(module):
    for size in (None, (3, 5)):
        check(partial(module.upsample_nearest, size=size), arrays((2, 2, 3, 2)))


def recompute(module):
    linear = Linear("a", 3, 3)
    check(partial(module.recompute, linear), arrays((2, 3)), random_params(linear))


def vq_decoder(module):
    """Straight through its codebook, at whose vectors the complex step has its derivative."""
    config = {key: value for key, value in VAE.items() if key != "shift_factor"}
    model = module.VQModel(config | {"num_vq_embeddings": 4})
    params = random_params(model)
    moved = {n: w for n, w in params.items() if n.startswith(("decoder.", "post_quant_conv."))}
    held = {n: w for n, w in params.items() if n not in moved}
    check(lambda p, z: model.decode(held | p, z), arrays((1, 2, 2, 2)), moved, method="complex")


def perceptual(module):
    def features(x):
        k = np.arange(3.0)  # channels that differ, though those of a grey image are alike

        def backward(dmaps):
            return 2 * x * dmaps[0] + (3 * k * x * x + 1) * dmaps[1]

        return [x * x, k * x**3 + x], backward

    made, real = arrays((2, 2, 2, 3), (2, 2, 2, 3))
    distance = module.perceptual_loss(features)
    check(lambda made: distance(made, real + 1), made)
    criterion = module.with_perception(module.squared_error, features, 0.7)
    check(lambda made: as_function(criterion({}, made, real + 1)), made)
    made, real = arrays((2, 2, 2, 1), (2, 2, 2, 1))
    check(lambda made: as_function(criterion({}, made, real + 1)), made)
    check_other_calls(lambda made: distance(made, real + 1), [made])


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
    "geglu": function("geglu", (2, 3, 8)),
    "group_norm": function("group_norm", (2, 7, 4), (4,), (4,), groups=2, eps=1e-2),
    "group_norm_silu": function("group_norm_silu", (2, 7, 4), (4,), (4,), groups=2, eps=1e-2),
    "offset": function("offset", (2, 3, 3), (4, 3)),
    "layer_norm": function("layer_norm", (6, 5), (5,), (5,), eps=1e-2),
    "unit_norm": function("unit_norm", (2, 3, 5), eps=1e-2),
    "upsample": upsample,
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
    "recompute": recompute,
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
    "TextTimeEmbedding": layer(lambda m: m.TextTimeEmbedding("a", 4, 3, 2), (2, 3, 4)),
    "Upsample": layer(lambda m: m.Upsample("a", 2), (2, 2, 3, 2)),
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
    "vq decoder": vq_decoder,
    "discriminator": discriminator,
    "first stage": first_stage_losses,
    "adversarial": adversarial,
    "perceptual": perceptual,
    "codebook_loss": codebook_loss,
    "straight_through": straight_through,
}


MODULES = {  # → its checks
    "tinyldm.nn.activations": ["silu", "leaky_relu", "quick_gelu", "gelu", "geglu"],
    "tinyldm.kernels.cpu.activations": ["gelu", "geglu", "silu"],
    "tinyldm.kernels.cpu.linear": ["linear"],
    "tinyldm.nn.functional": [
        "offset",
        "linear",
        "embedding",
        "upsample",
        "mean",
        "concatenate",
        "mse",
        "hinge",
        "weighted_mean",
        "cross_entropy",
        "kl",
    ],
    "tinyldm.nn.norms": ["group_norm", "group_norm_silu", "layer_norm", "unit_norm"],
    "tinyldm.kernels.cpu.group_norm": ["group_norm", "group_norm_silu"],
    "tinyldm.kernels.cpu.layer_norm": ["layer_norm"],
    "tinyldm.kernels.cpu.winograd": ["winograd"],
    "tinyldm.nn.conv": ["conv2d"],
    "tinyldm.kernels.cpu.pointwise": ["pointwise"],
    "tinyldm.kernels.windows": ["windows"],
    "tinyldm.kernels.im2col": ["im2col"],
    "tinyldm.nn.attention": ["attention"],
    "tinyldm.kernels.attention": ["attention"],
    "tinyldm.nn.layers": ["Linear"],
    "tinyldm.nn.protocol": ["add_grad", "recompute"],
    "tinyldm.models.blocks": [
        "SpatialTransformer",
        "ResnetBlock",
        "Attention",
        "TransformerBlock",
        "SpatialAttention",
        "AttentionPool",
        "TextTimeEmbedding",
        "Upsample",
    ],
    "tinyldm.models.levels": ["skips of one level", "skips", "context", "middle"],
    "tinyldm.models.unet": [
        "skips of one level",
        "skips",
        "middle",
        "context",
        "labels",
        "pooled text",
    ],
    "tinyldm.models.autoencoder": ["gaussians", "sample", "draw"],
    "tinyldm.models.coders": ["coders"],
    "tinyldm.models.classifier": ["classifier"],
    "tinyldm.models.vq": ["vq sample", "vq", "vq decoder"],
    "tinyldm.models.discriminator": ["discriminator"],
    "tinyldm.training.losses": ["first stage", "perceptual"],
    "tinyldm.training.adversarial": ["adversarial"],
    "tinyldm.nn.quantize": ["codebook_loss", "straight_through"],
    "tinyldm.models.text_encoder": ["text encoder"],
}


def see(arrays):
    """Called with what a check computed without `check_gradients`; tests.mutants hashes it."""


def on_gpu(twin, name):
    """The check of a kernel for a GPU: it gives what its twin gives, also without the weights."""

    def check_on_gpu(module):
        for call in examples(twin, name, getattr(module, name)):
            found = results(call)
            see(found)
            for x, wanted in zip(found, of_twin(plain_twin(twin), call), strict=True):
                if x is not None or wanted is not None:
                    np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5)
            if "w" in call.shapes:
                assert_equal(results(call, weights=False)[:2], found[:2])

    return check_on_gpu


if COMPILER:
    for _twin, _name in CUDA_CALLS:
        CHECKS[_name] = on_gpu(_twin, _name)
        (_kernel,) = (k.function for k in KERNELS[_twin] if k.function.__name__ == _name)
        MODULES.setdefault(_kernel.__module__, []).append(_name)
