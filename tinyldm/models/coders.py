"""Encoder and decoder of diffusers' autoencoders, and what all first stages with them share."""

from types import SimpleNamespace

from numpy.random import Generator

from tinyldm.backend import Array
from tinyldm.config import ConfigError, check_kind, per_block, read_config
from tinyldm.models.blocks import ResnetBlock, SpatialAttention, Upsample, downsample
from tinyldm.nn.layers import Conv2d, GroupNorm, Layer, Recomputed, zeros
from tinyldm.nn.protocol import Backward, Params

DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
FIXED = {
    "act_fn": ["silu", "swish"],
    "force_upcast": [True, False],  # about float16, which is not used here
}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
EPS = 1e-6  # of every group norm in an autoencoder


class Autoencoder(Layer):
    """Autoencoder: images (n, h, w, in_channels) ↔ features (n, h/f, w/f, c), f = 2^(blocks − 1).

    c: the config. encoded: output channels of the encoder. features: channels after `quant_conv`,
    if there is one. latent_channels: channels that `decode` takes; `post_quant_conv`, if any,
    maps them to the config's.
    """

    def __init__(
        self,
        c: SimpleNamespace,
        encoded: int,
        features: int,
        latent_channels: int,
        convolutions: tuple[bool, bool] = (True, True),
    ):
        self.config, self.latent_channels = c, latent_channels
        self.shift = getattr(c, "shift_factor", None) or 0  # of latents, before they are scaled
        check_kind("vae config", "layers_per_block", c.layers_per_block, int)  # one for all blocks
        levels = len(c.block_out_channels)
        if c.layers_per_block == 0 and len(set(c.block_out_channels)) > 1:
            raise ConfigError(
                f"vae config: layers_per_block = 0 leaves the channels as they are, but "
                f"block_out_channels = {list(c.block_out_channels)}; expected all alike"
            )
        for key in BLOCKS:
            for kind in per_block("vae config", key, getattr(c, key), levels):
                read_config("vae config", {key: kind}, {}, BLOCKS)
        self.factor = 2 ** (levels - 1)
        quant, post_quant = convolutions
        self.encoder = Encoder("encoder", c, encoded)
        self.quant = Conv2d("quant_conv", encoded, features, 1) if quant else None
        self.post_quant = (
            Conv2d("post_quant_conv", latent_channels, c.latent_channels, 1) if post_quant else None
        )
        self.decoder = Decoder("decoder", c)

    def recompute(self) -> None:
        """Keep no activations inside a layer from now on: less memory, one more forward pass."""
        for coder in (self.encoder, self.decoder):
            coder.layers = [Recomputed(layer) for layer in coder.layers]

    def init(self, rng: Generator) -> Params:
        """Draw parameters. Biases start at 0, unlike the U-Net's: a faster, steadier start."""
        params = super().init(rng)
        return {name: w * 0 if name.endswith(".bias") else w for name, w in params.items()}

    def encode(self, params: Params, images: Array) -> tuple[Array, Backward]:
        """Encode images → features (n, h/f, w/f, c). backward(dy, grads) → dimages.

        Raises ValueError for another number of channels, or a size that f does not divide.
        """
        if images.ndim != 4 or images.shape[3] != self.config.in_channels:
            raise ValueError(
                f"vae: expected images (n, h, w, {self.config.in_channels}), found {images.shape}"
            )
        h, w = images.shape[1:3]
        if h % self.factor or w % self.factor:
            raise ValueError(
                f"vae: height and width must be multiples of {self.factor}, found {h}×{w}; "
                f"the nearest is {_nearest(h, self.factor)}×{_nearest(w, self.factor)}"
            )
        h, encoder_back = self.encoder(params, images)
        if self.quant:
            h, quant_back = self.quant(params, h)

        def backward(dfeatures, grads):
            dh = quant_back(dfeatures, grads) if self.quant else dfeatures
            return encoder_back(dh, grads)

        return h, backward

    def decode(self, params: Params, z: Array) -> tuple[Array, Backward]:
        """Decode latents (n, h/f, w/f, latent_channels) → images (n, h, w, out_channels)."""
        h, features_back = self.decode_features(params, z)
        images, conv_back = self.decoder.conv_out(params, h)

        def backward(dimages, grads):
            return features_back(conv_back(dimages, grads), grads)

        return images, backward

    def decode_features(self, params: Params, z: Array) -> tuple[Array, Backward]:
        """Decode without the last convolution: → features (n, h, w, c) that it is applied to."""
        if self.post_quant:
            z, quant_back = self.post_quant(params, z)
        h, decoder_back = self.decoder(params, z)

        def backward(dh, grads):
            dz = decoder_back(dh, grads)
            return quant_back(dz, grads) if self.post_quant else dz

        return h, backward

    def draw(
        self, params: Params, images: Array, noise: Array | None = None
    ) -> tuple[Array, Backward]:
        """Encode images → z at the autoencoder's own scale; `noise` is for those that draw it."""
        return self.encode(params, images)

    def to_latents(
        self, params: Params, images: Array, noise: Array | None = None
    ) -> tuple[Array, Backward]:
        """Encode images → latents at the scale of the diffusion: (z − shift) · scaling_factor.

        noise: see `draw`.
        """
        z, draw_back = self.draw(params, images, noise)
        scale = self.config.scaling_factor

        def backward(dlatents, grads):
            return draw_back(dlatents * scale, grads)

        return (z - self.shift) * scale, backward

    def from_latents(self, params: Params, latents: Array) -> tuple[Array, Backward]:
        """Decode latents at the scale of the diffusion: latents / scaling_factor + shift."""
        scale = 1 / self.config.scaling_factor
        images, decode_back = self.decode(params, latents * scale + self.shift)

        def backward(dimages, grads):
            return decode_back(dimages, grads) * scale

        return images, backward


class Encoder(Layer):
    """Encode images (n, h, w, in_channels) → (n, h/f, w/f, moments); `c` is the config."""

    def __init__(self, name: str, c: SimpleNamespace, moments: int):
        widths = list(c.block_out_channels)
        self.conv_in = Conv2d(f"{name}.conv_in", c.in_channels, widths[0])
        self.layers = []
        for level, width in enumerate(widths):
            block = f"{name}.down_blocks.{level}"
            for i in range(c.layers_per_block):
                c_in = widths[max(0, level - 1)] if i == 0 else width
                self.layers.append(_resnet(f"{block}.resnets.{i}", c_in, width, c))
            if level < len(widths) - 1:
                self.layers.append(downsample(block, width, padding=(0, 1, 0, 1)))
        self.layers += _middle(name, widths[-1], c)
        self.norm_out = GroupNorm(
            f"{name}.conv_norm_out", widths[-1], c.norm_num_groups, EPS, silu=True
        )
        self.conv_out = Conv2d(f"{name}.conv_out", widths[-1], moments)

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        return _chain([self.conv_in, *self.layers, self.norm_out, self.conv_out], params, x)


class Decoder(Layer):
    """Decode latents (n, h, w, latent_channels) → features (n, f·h, f·w, c), for `conv_out`."""

    def __init__(self, name: str, c: SimpleNamespace):
        widths = list(c.block_out_channels)[::-1]
        self.conv_in = Conv2d(f"{name}.conv_in", c.latent_channels, widths[0])
        self.layers = _middle(name, widths[0], c)
        for level, width in enumerate(widths):
            block = f"{name}.up_blocks.{level}"
            for i in range(c.layers_per_block + 1):
                c_in = widths[max(0, level - 1)] if i == 0 else width
                self.layers.append(_resnet(f"{block}.resnets.{i}", c_in, width, c))
            if level < len(widths) - 1:
                self.layers.append(Upsample(block, width))
        self.norm_out = GroupNorm(
            f"{name}.conv_norm_out", widths[-1], c.norm_num_groups, EPS, silu=True
        )
        self.conv_out = Conv2d(f"{name}.conv_out", widths[-1], c.out_channels)

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        return _chain([self.conv_in, *self.layers, self.norm_out], params, x)


class TimelessResnet(ResnetBlock):
    """A ResNet block without time: one input, one gradient."""

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        y, resnet_back = super().__call__(params, x)

        def backward(dy, grads):
            dx, _ = resnet_back(dy, grads)
            return dx

        return y, backward


def _resnet(name, c_in, c_out, c):
    return TimelessResnet(name, c_in, c_out, c.norm_num_groups, EPS, init=zeros)


def _middle(name, width, c):
    block = f"{name}.mid_block"
    attention = SpatialAttention(f"{block}.attentions.0", width, c.norm_num_groups, EPS)
    return [
        _resnet(f"{block}.resnets.0", width, width, c),
        *([attention] if c.mid_block_add_attention else []),
        _resnet(f"{block}.resnets.1", width, width, c),
    ]


def _chain(layers, params, x):
    """Apply the layers one after the other."""
    backs = []
    for layer in layers:
        x, layer_back = layer(params, x)
        backs.append(layer_back)

    def backward(dy, grads):
        for layer_back in reversed(backs):
            dy = layer_back(dy, grads)
        return dy

    return x, backward


def _nearest(size, factor):
    return max(factor, round(size / factor) * factor)
