"""What is trained: the networks of a run, the loss of each stage, one step of the optimizer."""

import math
from collections.abc import Callable

from numpy.random import Generator

from tinyldm.backend import Array, array_module
from tinyldm.checkpoints import make
from tinyldm.diffusion.objective import WEIGHTINGS, diffusion_loss
from tinyldm.diffusion.schedule import Schedule
from tinyldm.models import AutoencoderKL, ClassNames, Tokenizer, VQModel
from tinyldm.models.autoencoder import kl_loss, sample_gaussian, split_moments
from tinyldm.nn import functional as F
from tinyldm.nn import no_grad
from tinyldm.nn.protocol import Params
from tinyldm.pixels import from_uint8, in_channels
from tinyldm.training.config import STAGES, Config
from tinyldm.training.optim import adamw, clip_factor, global_norm
from tinyldm.training.parallel import Gradient
from tinyldm.training.state import State

MAX_NORM = 1.0  # of the gradient


class Models:
    """The networks of a run, without parameters."""

    def __init__(self, config: Config, tokenizer: Tokenizer | ClassNames):
        self.config, self.tokenizer = config, tokenizer
        configs = config.configs(tokenizer)
        self.schedule = Schedule(configs.pop("scheduler"))
        networks = {name: make(name, of_network) for name, of_network in configs.items()}
        self.vae, self.unet = networks["vae"], networks["unet"]
        self.text = networks.get("text_encoder")  # or a ClassEmbedder, or none
        if config.checkpointing:
            for network in (self.unet, self.vae) if self.vae.shapes() else (self.unet,):
                network.recompute()

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that there are to train."""
        return STAGES if self.vae.shapes() else STAGES[1:]

    def init_denoiser(self, rng: Generator) -> Params:
        """Fresh parameters of all that stage 2 trains."""
        return self.unet.init(rng) | (self.text.init(rng) if self.text else {})

    def pixels(self, images: Array) -> Array:
        """uint8 (n, h, w, 3) → what the first stage takes: float32 in −1…1, grey if it is."""
        return in_channels(from_uint8(images), self.config.picture_channels)

    def first_stage_loss(self) -> Callable:
        """Of a batch of pictures and, for a KL autoencoder, of noise like their latents."""
        if isinstance(self.vae, VQModel):
            return vq_loss(self.vae)
        return autoencoder_loss(self.vae, self.config.kl_weight)

    def gaussians(self, params: Params, images: Array) -> tuple[Array, Array | None]:
        """Mean and standard deviation of the latents of pictures in −1…1, at their own scale.

        Where they are not drawn from a Gaussian it is the latents themselves, and None.
        """
        with no_grad():
            if not isinstance(self.vae, AutoencoderKL):
                return self.vae.to_latents(params, images)[0], None
            mean, logvar, _ = split_moments(self.vae.encode(params, images)[0])
            return mean, array_module(mean).exp(0.5 * logvar)


def autoencoder_loss(vae: AutoencoderKL, kl_weight: float) -> Callable:
    """Mean squared error of the reconstruction + kl_weight · mean KL of a latent number."""

    def loss_fn(params, images, noise):
        moments, encode_back = vae.encode(params, images)
        z, sample_back = sample_gaussian(moments, noise)
        reconstruction, decode_back = vae.decode(params, z)
        error, error_back = F.mse(reconstruction, images)
        kl, kl_back = kl_loss(moments)
        weight = kl_weight / math.prod(z.shape[1:])

        def backward(grads):
            dimages, _ = error_back()
            dmoments = sample_back(decode_back(dimages, grads)) + kl_back(weight)
            encode_back(dmoments, grads)

        return error + weight * kl, backward

    return loss_fn


def vq_loss(vae: VQModel) -> Callable:
    """Mean squared error of the reconstruction + codebook and commitment loss."""

    def loss_fn(params, images):
        z, encode_back = vae.encode(params, images)
        codebook, codebook_back = vae.quantize.loss(params, z)
        reconstruction, decode_back = vae.decode(params, z)
        error, error_back = F.mse(reconstruction, images)

        def backward(grads):
            dimages, _ = error_back()
            encode_back(decode_back(dimages, grads) + codebook_back(1.0, grads), grads)

        return error + codebook, backward

    return loss_fn


def denoiser_loss(models: Models) -> Callable:
    """The diffusion loss of U-Net and text encoder, whose parameters share one dict.

    ids: token ids (n, l), or classes (n,). beside: what the U-Net sees beside the latents, if its
    task gives it something.
    """
    weighting = WEIGHTINGS[models.config.weighting]

    def loss_fn(params, z, noise, ids, t, beside=None):
        condition = {"labels": ids}
        if models.text:
            context, text_back = models.text(params, ids)
            condition = {"context": context}

        def predict(x, t):
            if beside is not None:
                x = array_module(x).concatenate([x, beside], axis=-1)
            prediction, unet_back = models.unet(params, x, t, **condition)

            def backward(dprediction, grads):
                _, dcontext = unet_back(dprediction, grads)
                if models.text:
                    text_back(dcontext, grads)

            return prediction, backward

        return diffusion_loss(predict, models.schedule, z, noise, t, weighting)

    return loss_fn


def train_step(
    state: State, gradient: Gradient, batch: tuple[Array, ...], rate: float, ema: float
) -> tuple[Array, Array]:
    """One step of the optimizer on one batch → loss and norm of the gradient, on the device.

    gradient: `gradient(batch) → (loss, gradients)` at the state's parameters.
    """
    loss, grads = gradient(batch)
    norm = global_norm(grads)
    adamw(
        state.params, grads, state.moments, state.average, state.step, rate,
        scale=clip_factor(norm, MAX_NORM), ema=ema,
    )  # fmt: skip
    return loss, norm
