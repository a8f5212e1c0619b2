"""The vector-quantised first stage: latents from a learned codebook, diffusers' VQModel.

Rombach et al. 2022, section 3.1 and appendix D.1: the diffusion works on the latents before
quantisation, and the decoder quantises them first of all.
"""

from tinyldm.backend import Array, array_module
from tinyldm.config import read_config
from tinyldm.models import coders
from tinyldm.nn import quantize
from tinyldm.nn.layers import Initialiser, Layer, Shape, uniform_fan_in
from tinyldm.nn.protocol import Backward, Params, add_grad, no_grad, wants_grad

DEFAULTS = coders.DEFAULTS | {
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
}
FIXED = coders.FIXED | {"norm_type": ["group"], "lookup_from_codebook": [False]}


class VQModel(coders.Autoencoder):
    """VQ autoencoder: images (n, h, w, 3) in −1…1 ↔ latents (n, h/f, w/f, c), not yet quantised.

    c is vq_embed_dim or, where that is None, latent_channels. config: the keys of diffusers'
    VQModel; ConfigError names what is not implemented.
    """

    def __init__(self, config: dict):
        c = read_config("vae config", config, DEFAULTS, FIXED)
        d = c.vq_embed_dim or c.latent_channels
        super().__init__(c, c.latent_channels, d, d)
        self.quantize = Codebook("quantize.embedding", c.num_vq_embeddings, d)

    draws_noise = False  # latents are the encoder's output

    def sample(
        self, params: Params, images: Array, noise: Array | None = None
    ) -> tuple[Array, Array, Backward]:
        """Encode images → z before quantisation, and the codebook and commitment loss.

        backward(dz, dloss, grads) → dimages. `noise` is not used: none is drawn.
        """
        z, encode_back = self.encode(params, images)
        loss, loss_back = self.quantize.loss(params, z)

        def backward(dz, dloss, grads):
            return encode_back(dz + loss_back(dloss, grads), grads)

        return z, loss, backward

    def latent_distribution(self, params: Params, images: Array) -> tuple[Array, Array | None]:
        """Return the latents of images at their own scale, and None: they have no spread."""
        with no_grad():
            return self.encode(params, images)[0], None

    def describe(self, params: Params, images: Array) -> dict[str, float]:
        """Measure how much of the codebook images use: the share of codes, and their perplexity."""
        with no_grad():
            codes = self.quantize.codes(params, self.encode(params, images)[0])
        used = array_module(codes).bincount(codes.reshape(-1), minlength=self.quantize.count) > 0
        count = self.quantize.count
        return {"usage": float(used.mean()), "perplexity": quantize.perplexity(codes, count)}

    def decode_features(self, params: Params, z: Array) -> tuple[Array, Backward]:
        """Quantise latents at the autoencoder's own scale and decode them → features."""
        z, quantize_back = self.quantize(params, z)
        h, features_back = super().decode_features(params, z)

        def backward(dh, grads):
            return quantize_back(features_back(dh, grads), grads)

        return h, backward


class Codebook(Layer):
    """Codebook: z (..., d) → the nearest of `count` learned vectors, with the gradient of z."""

    def __init__(self, name: str, count: int, d: int):
        self.weight, self.count, self.d = f"{name}.weight", count, d

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        return {self.weight: ((self.count, self.d), uniform_fan_in(self.count**2))}  # ± 1/count

    def codes(self, params: Params, z: Array) -> Array:
        """Return the index of the nearest vector, (...)."""
        return quantize.nearest_codes(z, params[self.weight])

    def __call__(self, params: Params, z: Array) -> tuple[Array, Backward]:
        y, straight_back = quantize.straight_through(z, params[self.weight], self.codes(params, z))

        def backward(dy, grads):
            return straight_back(dy)

        return y, backward

    def loss(self, params: Params, z: Array, commitment: float = 0.25) -> tuple[Array, Backward]:
        """Codebook loss between z and the vectors, `codebook_loss`; backward(dloss, grads) → dz."""
        codes = self.codes(params, z)
        loss, loss_back = quantize.codebook_loss(z, params[self.weight], codes, commitment)

        def backward(dloss, grads):
            dz, dcodebook = loss_back(dloss, weights=wants_grad(grads, self.weight))
            if dcodebook is not None:
                add_grad(grads, self.weight, dcodebook)
            return dz

        return loss, backward
