"""No first stage: the pixels are the latents, and the same code does diffusion in pixels."""

from tinyldm.backend import Array
from tinyldm.config import read_config
from tinyldm.nn.layers import Layer
from tinyldm.nn.protocol import Backward, Params

DEFAULTS = {"in_channels": 3, "scaling_factor": 1.0, "sample_size": 32}


class IdentityFirstStage(Layer):
    """Identity as first stage: images ↔ images · scaling_factor; f = 1, no parameters.

    It stands where AutoencoderKL and VQModel do, for diffusion in pixels (Ho et al. 2020).
    """

    factor = 1
    draws_noise = False

    def __init__(self, config: dict):
        self.config = read_config("vae config", config, DEFAULTS, {})
        self.latent_channels = self.config.in_channels

    def to_latents(
        self, params: Params, images: Array, noise: Array | None = None
    ) -> tuple[Array, Backward]:
        """Scale images to the scale of the diffusion. `noise` is not used."""
        return self._scaled(images, self.config.scaling_factor)

    def latent_distribution(self, params: Params, images: Array) -> tuple[Array, Array | None]:
        """Return the images at their own scale, and None: they have no spread."""
        return images.copy(), None

    def from_latents(self, params: Params, latents: Array) -> tuple[Array, Backward]:
        """Divide latents by scaling_factor, the inverse of `to_latents`."""
        return self._scaled(latents, 1 / self.config.scaling_factor)

    def _scaled(self, x, scale):
        def backward(dy, grads):
            return dy * scale

        return x * scale, backward
