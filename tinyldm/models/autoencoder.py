"""The first stage: pictures to latents and back, diffusers' AutoencoderKL.

The encoder gives a diagonal Gaussian for each latent pixel, of which one is drawn; a slight pull
towards the standard normal keeps the latents in one place (Rombach et al. 2022, section 3.1;
Kingma & Welling 2013).
"""

from types import SimpleNamespace

from numpy.random import Generator

from tinyldm.backend import Array, array_module
from tinyldm.config import per_block, read_config
from tinyldm.models.blocks import ResnetBlock, SpatialAttention, Upsample, downsample
from tinyldm.nn import functional as F
from tinyldm.nn.layers import Conv2d, GroupNorm, Layer, zeros
from tinyldm.nn.protocol import Backward, Params, differentiable

DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
FIXED = {
    "act_fn": ["silu", "swish"],
    "latents_mean": [None],
    "latents_std": [None],
    "force_upcast": [True, False],  # about float16, which is not used here
}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
EPS = 1e-6  # of every group norm in the autoencoder
LOGVAR_RANGE = (-30.0, 20.0)


class AutoencoderKL(Layer):
    """Pictures (n, h, w, 3) in −1…1 ↔ latents (n, h/f, w/f, latent_channels).

    config: the keys of diffusers' AutoencoderKL; f = 2^(number of blocks − 1). ConfigError names
    what is not implemented. Every backward pass is (dy, grads) → dx.
    """

    def __init__(self, config: dict):
        self.config = c = read_config("vae config", config, DEFAULTS, FIXED)
        levels = len(c.block_out_channels)
        for key in BLOCKS:
            for kind in per_block("vae config", key, getattr(c, key), levels):
                read_config("vae config", {key: kind}, {}, BLOCKS)
        self.factor = 2 ** (levels - 1)
        moments = 2 * c.latent_channels
        self.encoder = Encoder("encoder", c, moments)
        self.quant = Conv2d("quant_conv", moments, moments, 1) if c.use_quant_conv else None
        self.post_quant = (
            Conv2d("post_quant_conv", c.latent_channels, c.latent_channels, 1)
            if c.use_post_quant_conv
            else None
        )
        self.decoder = Decoder("decoder", c)

    def init(self, rng: Generator) -> Params:
        """Fresh parameters. Biases start at 0, unlike the U-Net's: a faster, steadier start."""
        params = super().init(rng)
        return {name: w * 0 if name.endswith(".bias") else w for name, w in params.items()}

    def encode(self, params: Params, images: Array) -> tuple[Array, Backward]:
        """→ moments (n, h/f, w/f, 2·latent_channels): mean, then logarithm of the variance.

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

        def backward(dmoments, grads):
            dh = quant_back(dmoments, grads) if self.quant else dmoments
            return encoder_back(dh, grads)

        return h, backward

    def decode(self, params: Params, z: Array) -> tuple[Array, Backward]:
        """Latents at the autoencoder's own scale → pictures (n, h, w, out_channels)."""
        if self.post_quant:
            z, quant_back = self.post_quant(params, z)
        images, decoder_back = self.decoder(params, z)

        def backward(dimages, grads):
            dz = decoder_back(dimages, grads)
            return quant_back(dz, grads) if self.post_quant else dz

        return images, backward

    def to_latents(
        self, params: Params, images: Array, noise: Array | None = None
    ) -> tuple[Array, Backward]:
        """Pictures → latents at the scale of the diffusion: (z − shift) · scaling_factor.

        `noise` (n, h/f, w/f, latent_channels), standard normal, draws z from the Gaussian;
        without it z is the mean. Raises ValueError for noise of another shape.
        """
        moments, encode_back = self.encode(params, images)
        latents = (*moments.shape[:3], self.config.latent_channels)
        if noise is not None and noise.shape != latents:
            raise ValueError(f"vae: expected noise {latents}, found {noise.shape}")
        z, sample_back = sample_gaussian(moments, noise)
        scale, shift = self.config.scaling_factor, self.config.shift_factor or 0

        def backward(dlatents, grads):
            return encode_back(sample_back(dlatents * scale), grads)

        return (z - shift) * scale, backward

    def from_latents(self, params: Params, latents: Array) -> tuple[Array, Backward]:
        """The way back: latents / scaling_factor + shift, decoded."""
        scale, shift = self.config.scaling_factor, self.config.shift_factor or 0
        images, decode_back = self.decode(params, latents * (1 / scale) + shift)

        def backward(dimages, grads):
            return decode_back(dimages, grads) * (1 / scale)

        return images, backward


def split_moments(moments: Array) -> tuple[Array, Array, Array]:
    """(n, h, w, 2c) → mean, log-variance and where it is within its bounds, all (n, h, w, c).

    The log-variance is clamped to LOGVAR_RANGE; a clamped entry has slope 0.
    """
    c = moments.shape[-1] // 2
    mean, logvar = moments[..., :c], moments[..., c:]
    low, high = LOGVAR_RANGE
    xp = array_module(moments)
    inside = (logvar.real >= low) & (logvar.real <= high)
    return mean, xp.where(inside, logvar, xp.clip(logvar.real, low, high)), inside


@differentiable
def sample_gaussian(moments: Array, noise: Array | None = None) -> tuple[Array, Backward]:
    """z = mean + e^(logvar/2) · noise, or the mean (Kingma & Welling 2013, section 2.4).

    moments (n, h, w, 2c), noise and z (n, h, w, c).
    """
    xp = array_module(moments)
    mean, logvar, inside = split_moments(moments)
    if noise is None:
        z = mean.copy()
    else:
        spread = xp.exp(0.5 * logvar) * noise
        z = mean + spread

    def backward(dz):
        dlogvar = xp.zeros_like(dz) if noise is None else 0.5 * dz * spread * inside
        return xp.concatenate([dz, dlogvar], axis=-1)

    return z, backward


@differentiable
def kl_loss(moments: Array) -> tuple[Array, Backward]:
    """KL divergence of the moments' Gaussian from N(0, 1), summed over latents, mean over n."""
    xp = array_module(moments)
    mean, logvar, inside = split_moments(moments)
    kl, kl_back = F.kl_to_standard_normal(mean, logvar)

    def backward(dloss=1.0):
        dmean, dlogvar = kl_back(dloss)
        return xp.concatenate([dmean, dlogvar * inside], axis=-1)

    return kl, backward


class Encoder(Layer):
    """Pictures (n, h, w, in_channels) → (n, h/f, w/f, moments); `c` is the config."""

    def __init__(self, name: str, c: SimpleNamespace, moments: int):
        widths = list(c.block_out_channels)
        self.conv_in = Conv2d(f"{name}.conv_in", c.in_channels, widths[0])
        self.stages = []
        for level, width in enumerate(widths):
            block = f"{name}.down_blocks.{level}"
            for i in range(c.layers_per_block):
                c_in = widths[max(0, level - 1)] if i == 0 else width
                self.stages.append(_resnet(f"{block}.resnets.{i}", c_in, width, c))
            if level < len(widths) - 1:
                self.stages.append(downsample(block, width, padding=(0, 1, 0, 1)))
        self.stages += _middle(name, widths[-1], c)
        self.norm_out = GroupNorm(
            f"{name}.conv_norm_out", widths[-1], c.norm_num_groups, EPS, silu=True
        )
        self.conv_out = Conv2d(f"{name}.conv_out", widths[-1], moments)

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        return _chain([self.conv_in, *self.stages, self.norm_out, self.conv_out], params, x)


class Decoder(Layer):
    """Latents (n, h, w, latent_channels) → pictures (n, f·h, f·w, out_channels)."""

    def __init__(self, name: str, c: SimpleNamespace):
        widths = list(c.block_out_channels)[::-1]
        self.conv_in = Conv2d(f"{name}.conv_in", c.latent_channels, widths[0])
        self.stages = _middle(name, widths[0], c)
        for level, width in enumerate(widths):
            block = f"{name}.up_blocks.{level}"
            for i in range(c.layers_per_block + 1):
                c_in = widths[max(0, level - 1)] if i == 0 else width
                self.stages.append(_resnet(f"{block}.resnets.{i}", c_in, width, c))
            if level < len(widths) - 1:
                self.stages.append(Upsample(block, width))
        self.norm_out = GroupNorm(
            f"{name}.conv_norm_out", widths[-1], c.norm_num_groups, EPS, silu=True
        )
        self.conv_out = Conv2d(f"{name}.conv_out", widths[-1], c.out_channels)

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        return _chain([self.conv_in, *self.stages, self.norm_out, self.conv_out], params, x)


class _TimelessResnet(ResnetBlock):
    """A ResNet block without time: one input, one gradient."""

    def __call__(self, params, x):
        y, resnet_back = super().__call__(params, x)

        def backward(dy, grads):
            dx, _ = resnet_back(dy, grads)
            return dx

        return y, backward


def _resnet(name, c_in, c_out, c):
    return _TimelessResnet(name, c_in, c_out, c.norm_num_groups, EPS, init=zeros)


def _middle(name, width, c):
    block = f"{name}.mid_block"
    attention = SpatialAttention(f"{block}.attentions.0", width, c.norm_num_groups, EPS)
    return [
        _resnet(f"{block}.resnets.0", width, width, c),
        *([attention] if c.mid_block_add_attention else []),
        _resnet(f"{block}.resnets.1", width, width, c),
    ]


def _chain(layers, params, x):
    """The layers one after the other."""
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
