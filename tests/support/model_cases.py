"""Small networks for the tests: configurations drawn at random, and numbers for their weights.

The numbers come from a formula and not from a generator, so they are the same everywhere and for
ever: the golden files hold only what the reference computed from them.
"""

import math
import zlib

import numpy as np
from hypothesis import strategies as st

SD15_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
SD15_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}


# ------------------------------------------------------------------------------------------ numbers


def numbers(key, *shape):
    """float64 numbers, uniform in −1…1, from a text `key` (SplitMix64, Steele et al. 2014)."""
    z = np.arange(1, 1 + math.prod(shape), dtype="uint64") * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(zlib.crc32(key.encode()) << 32)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)


def integers(key, count, *shape):
    """Whole numbers 0…count − 1 from a text `key`."""
    return np.int64((numbers(key, *shape) + 1) / 2 * count)


def random_params(shapes, key=""):
    """Every parameter random, also those that start as zeros or ones, of a trained model's size."""
    return {name: _random_param(f"{key} {name}", shape) for name, shape in shapes.items()}


def _random_param(key, shape):
    x = numbers(key, *shape)
    if len(shape) > 1:  # keeps the size of activations: (…, c_in, c_out) or (d_out, d_in)
        fan_in = math.prod(shape[:3]) if len(shape) == 4 else shape[1]
        return x * math.sqrt(3 / fan_in)
    if key.endswith(".weight"):  # of a norm: both signs, none near zero
        return np.copysign(0.75 + 0.5 * abs(x), x)
    return 0.5 * x


def used_by(params, *parts):
    """The parameters whose names begin with one of `parts`."""
    return {name: x for name, x in params.items() if name.startswith(parts)}


few = st.integers(1, 3)
keys = st.integers(0, 999).map(str)

# ----------------------------------------------------------------------------------- configurations


@st.composite
def unet_configs(draw, levels=st.integers(1, 3), layers=st.integers(1, 2)):
    """Every flag of the U-Net that is implemented, in any combination."""
    count = draw(levels)

    def each(values):
        return draw(st.lists(values, min_size=count, max_size=count))

    def once_or_each(values):
        return draw(st.one_of(values, st.lists(values, min_size=count, max_size=count)))

    attention = each(st.booleans())
    return {
        "in_channels": draw(st.integers(1, 5)),
        "out_channels": draw(st.integers(1, 5)),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.integers(0, 1)),
        "down_block_types": [("CrossAttnDownBlock2D" if a else "DownBlock2D") for a in attention],
        "mid_block_type": draw(
            st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])
        ),
        "up_block_types": [
            ("CrossAttnUpBlock2D" if a else "UpBlock2D") for a in each(st.booleans())
        ],
        "block_out_channels": each(st.sampled_from([4, 8, 12])),
        "layers_per_block": once_or_each(layers),
        "norm_num_groups": draw(st.sampled_from([1, 2])),  # of two channels or more
        "norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "cross_attention_dim": draw(st.sampled_from([4, 6, 8])),
        "transformer_layers_per_block": once_or_each(layers),
        "attention_head_dim": once_or_each(st.sampled_from([1, 2, 4])),
        "use_linear_projection": draw(st.booleans()),
        "addition_embed_type": draw(st.sampled_from([None, "text"])),
        "addition_embed_type_num_heads": draw(st.sampled_from([1, 2])),
        "num_class_embeds": draw(st.sampled_from([None, 3])),
        "conv_in_kernel": draw(st.sampled_from([1, 3])),
        "conv_out_kernel": draw(st.sampled_from([1, 3])),
        "time_embedding_dim": draw(st.sampled_from([None, 6])),
    }


def unet_inputs(config, n=2, height=5, width=7, l=3):
    """x, t, context, labels: numbers for a call of the U-Net with this configuration."""
    labels = config.get("num_class_embeds")
    blocks = [config["mid_block_type"], *config["down_block_types"], *config["up_block_types"]]
    attends = config.get("addition_embed_type") or any("Attn" in str(kind) for kind in blocks)
    return (
        numbers("x", n, height, width, config.get("in_channels", 4)),
        integers("t", 1000, n),
        numbers("context", n, l, config["cross_attention_dim"]) if attends else None,
        integers("labels", labels, n) if labels else None,
    )


@st.composite
def vae_configs(draw, levels=st.integers(1, 3), layers=st.integers(1, 2)):
    count = draw(levels)
    return {
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.integers(1, 4)),
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "block_out_channels": draw(
            st.lists(st.sampled_from([4, 8, 12]), min_size=count, max_size=count)
        ),
        "layers_per_block": draw(layers),
        "latent_channels": draw(st.integers(1, 4)),
        "norm_num_groups": draw(st.sampled_from([1, 2])),  # of two channels or more
        "scaling_factor": draw(st.sampled_from([0.18215, 1.5])),
        "shift_factor": draw(st.sampled_from([None, 0.25])),
        "use_quant_conv": draw(st.booleans()),
        "use_post_quant_conv": draw(st.booleans()),
        "mid_block_add_attention": draw(st.booleans()),
    }


@st.composite
def vq_configs(draw, levels=st.integers(1, 3), layers=st.integers(1, 2)):
    config = draw(vae_configs(levels, layers))
    for key in ("shift_factor", "use_quant_conv", "use_post_quant_conv"):
        del config[key]
    return config | {
        "num_vq_embeddings": draw(st.integers(1, 9)),
        "vq_embed_dim": draw(st.sampled_from([None, 1, 3])),
    }


@st.composite
def text_configs(draw):
    heads = draw(st.integers(1, 3))
    return {
        "vocab_size": draw(st.integers(5, 20)),
        "hidden_size": heads * draw(st.integers(4, 6)),  # two features, normalised, are ±1
        "intermediate_size": draw(st.integers(3, 12)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "max_position_embeddings": draw(st.integers(4, 8)),
        "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
    }
