"""The first stage: images to latents and back, diffusers' AutoencoderKL.

The encoder gives the moments of a Gaussian over latents, from which z is drawn and decoded (Kingma
& Welling 2013; Rombach et al. 2022, section 3.1).
"""

import math

from tinyldm.backend import Array, array_module
from tinyldm.config import read_config
from tinyldm.models import coders
from tinyldm.nn import functional as F
from tinyldm.nn.protocol import Backward, Params, differentiable, no_grad

DEFAULTS = coders.DEFAULTS | {
    "latent_channels": 4,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
FIXED = coders.FIXED | {"latents_mean": [None], "latents_std": [None]}
LOGVAR_RANGE = (-30.0, 20.0)


class AutoencoderKL(coders.Autoencoder):
    """KL autoencoder: images (n, h, w, 3) in −1…1 ↔ latents (n, h/f, w/f, latent_channels).

    config: the keys of diffusers' AutoencoderKL; f = 2^(number of blocks − 1). ConfigError names
    what is not implemented. Every backward pass is (dy, grads) → dx.

    `encode` gives the moments (n, h/f, w/f, 2·latent_channels): mean, then logarithm of the
    variance. `decode` takes latents at the autoencoder's own scale.
    """

    def __init__(self, config: dict):
        c = read_config("vae config", config, DEFAULTS, FIXED)
        moments = 2 * c.latent_channels
        convolutions = c.use_quant_conv, c.use_post_quant_conv
        super().__init__(c, moments, moments, c.latent_channels, convolutions)

    draws_noise = True  # training draws latents from a Gaussian

    def sample(
        self, params: Params, images: Array, noise: Array | None = None
    ) -> tuple[Array, Array, Backward]:
        """Encode images and draw z at the autoencoder's own scale; see `draw` for `noise`.

        → z, the KL divergence per latent from N(0, 1), and backward(dz, dkl, grads) → dimages.
        """
        moments, encode_back = self.encode(params, images)
        z, sample_back = sample_gaussian(moments, noise)
        kl, kl_back = kl_loss(moments)
        size = math.prod(z.shape[1:])

        def backward(dz, dkl, grads):
            return encode_back(sample_back(dz) + kl_back(dkl / size), grads)

        return z, kl / size, backward

    def latent_distribution(self, params: Params, images: Array) -> tuple[Array, Array | None]:
        """Return mean and standard deviation of the latents of images, at their own scale."""
        with no_grad():
            mean, logvar, _ = split_moments(self.encode(params, images)[0])
        return mean, array_module(mean).exp(0.5 * logvar)

    def describe(self, params: Params, images: Array) -> dict[str, float]:
        """Measure the latents of images: their KL divergence from N(0, 1), per latent."""
        with no_grad():
            return {"kl": float(self.sample(params, images)[1])}

    def draw(
        self, params: Params, images: Array, noise: Array | None = None
    ) -> tuple[Array, Backward]:
        """Encode images → z at the autoencoder's own scale.

        `noise` (n, h/f, w/f, latent_channels), standard normal, draws z from the Gaussian;
        without it z is the mean. Raises ValueError for noise of another shape.
        """
        moments, encode_back = self.encode(params, images)
        latents = (*moments.shape[:3], self.config.latent_channels)
        if noise is not None and noise.shape != latents:
            raise ValueError(f"vae: expected noise {latents}, found {noise.shape}")
        z, sample_back = sample_gaussian(moments, noise)

        def backward(dz, grads):
            return encode_back(sample_back(dz), grads)

        return z, backward


def split_moments(moments: Array) -> tuple[Array, Array, Array]:
    """Split (n, h, w, 2c) → mean, log-variance, mask of what is within bounds, all (n, h, w, c).

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
    """Draw z = mean + e^(logvar/2) · noise, or the mean (Kingma & Welling 2013, section 2.4).

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
