"""What is trained: the networks of a run, the loss of each stage, one step of the optimizer."""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.random import Generator

from tinyldm.backend import Array, array_module
from tinyldm.checkpoints.components import make
from tinyldm.config import ConfigError
from tinyldm.data.images import from_uint8, in_channels
from tinyldm.diffusion.loss import WEIGHTINGS, diffusion_loss
from tinyldm.diffusion.schedule import Schedule
from tinyldm.models import AutoencoderKL, ClassNames, Tokenizer, VQModel
from tinyldm.models.autoencoder import split_moments
from tinyldm.models.discriminator import PatchDiscriminator
from tinyldm.nn import no_grad
from tinyldm.nn.protocol import Params
from tinyldm.training.config import STAGES, Config
from tinyldm.training.losses import (
    OF_ADVERSARIAL,
    OF_ERROR,
    Adversarial,
    Features,
    autoencoder_loss,
    discriminator_loss,
    squared_error,
    vq_loss,
    with_discriminator,
    with_perception,
)
from tinyldm.training.optim import adamw, clip_factor, global_norm
from tinyldm.training.parallel import Gradient, accumulated, gradients
from tinyldm.training.state import State

MAX_NORM = 1.0  # of the gradient
MAX_WEIGHT = 1e4  # of the discriminator


class Models:
    """The networks of a run, without parameters.

    features: the network of a perceptual loss, for a config that has one.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | ClassNames,
        features: Features | None = None,
    ):
        self.config, self.tokenizer, self.features = config, tokenizer, features
        configs = config.configs(tokenizer)
        self.schedule = Schedule(configs.pop("scheduler"))
        networks = {name: make(name, of_network) for name, of_network in configs.items()}
        self.vae, self.unet = networks["vae"], networks["unet"]
        self.text = networks.get("text_encoder")  # or a ClassEmbedder, or none
        if config.checkpointing:
            for network in (self.unet, self.vae) if self.vae.shapes() else (self.unet,):
                network.recompute()
        self.discriminator = None
        if config.adversarial:
            sizes = config.picture_channels, config.vae_widths[0], config.groups
            self.discriminator = PatchDiscriminator("discriminator", *sizes)

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

    def first_stage_loss(self) -> Callable | Adversarial:
        """Of a batch of pictures and, for a KL autoencoder, of noise like their latents.

        Raises ConfigError for a perceptual weight without a network, or a network without one.
        """
        config, vae, criterion = self.config, self.vae, squared_error
        if bool(config.perceptual) != bool(self.features):
            found = "none" if self.features is None else "one, and a weight of 0"
            raise ConfigError(
                f"perceptual: expected a weight in the config and a network of features (train and "
                f"resume take it as features=…), found a weight of {config.perceptual:g} and "
                f"{found}"
            )
        if self.features:
            criterion = with_perception(criterion, self.features, config.perceptual)

        def loss(criterion):
            if isinstance(vae, VQModel):
                return vq_loss(vae, criterion)
            return autoencoder_loss(vae, config.kl_weight, criterion)

        if self.discriminator is None:
            return loss(criterion)
        return Adversarial(
            plain=loss(criterion),
            generator=loss(with_discriminator(criterion, self.discriminator)),
            discriminator=discriminator_loss(vae, criterion, self.discriminator),
        )

    def gaussians(self, params: Params, images: Array) -> tuple[Array, Array | None]:
        """Mean and standard deviation of the latents of pictures in −1…1, at their own scale.

        Where they are not drawn from a Gaussian it is the latents themselves, and None.
        """
        with no_grad():
            if not isinstance(self.vae, AutoencoderKL):
                return self.vae.to_latents(params, images)[0], None
            mean, logvar, _ = split_moments(self.vae.encode(params, images)[0])
            return mean, array_module(mean).exp(0.5 * logvar)


def denoiser_loss(models: Models, beside: Callable[..., Array] | None = None) -> Callable:
    """The diffusion loss of U-Net and text encoder, whose parameters share one dict.

    ids: token ids (n, l), or classes (n,). beside: what the U-Net sees beside the latents, made of
    what else a batch holds for its task; None where that is nothing.
    """
    weighting = WEIGHTINGS[models.config.weighting]

    def loss_fn(params, z, noise, ids, t, *shown):
        seen = [beside(*shown)] if shown else []
        condition = {"labels": ids}
        if models.text:
            context, text_back = models.text(params, ids)
            condition = {"context": context}

        def predict(x, t):
            if seen:
                x = array_module(x).concatenate([x, *seen], axis=-1)
            prediction, unet_back = models.unet(params, x, t, **condition)

            def backward(dprediction, grads):
                _, dcontext = unet_back(dprediction, grads)
                if models.text:
                    text_back(dcontext, grads)

            return prediction, backward

        return diffusion_loss(predict, models.schedule, z, noise, t, weighting)

    return loss_fn


def new_discriminator(models: Models) -> Params:
    """Fresh parameters of the discriminator, on the host; none where there is none."""
    if models.discriminator is None:
        return {}
    return models.discriminator.init(np.random.default_rng((models.config.seed, 7)))


@contextlib.contextmanager
def stage_gradient(
    loss_fn: Callable | Adversarial,
    state: State,
    parts: int,
    numbers: dict[str, Array],
    processes: int | None = None,
) -> Iterator[Gradient]:
    """The gradient of a stage's loss for many steps: yields batch → (loss, gradients).

    parts: of a batch, one after the other. numbers: is given what else is known of a step, for its
    log. processes: see `parallel.gradient`.
    """
    losses = [loss_fn]
    if isinstance(loss_fn, Adversarial):
        losses = [loss_fn.plain, loss_fn.generator, loss_fn.discriminator]
    with gradients(losses, state.params, state.discriminator, processes) as at_once:
        first, *others = (accumulated(gradient_of, parts) for gradient_of in at_once)
        yield _alternating(state, numbers, first, *others) if others else first


def _alternating(state, numbers, plain, generator, discriminator):
    """The autoencoder's gradient with the discriminator frozen, and the other way round.

    Both are taken before either network moves, so the reconstructions that are judged are those
    that were to deceive. The discriminator's gradient is clipped here, on its own.
    """

    def gradient_of(batch):
        if not discriminates(state):
            return plain(batch)
        judged, grads = discriminator(batch)
        weight = adaptive_weight(grads.pop(OF_ERROR), grads.pop(OF_ADVERSARIAL))
        norm = global_norm(grads)
        factor = clip_factor(norm, MAX_NORM)
        xp = array_module(weight)
        weights = xp.ones(len(batch[0]), weight.dtype) * (state.config.adversarial * weight)
        loss, of_autoencoder = generator((*batch, weights))
        numbers.update(discriminator=judged, discriminator_norm=norm, adaptive_weight=weight)
        return loss, of_autoencoder | {name: factor * dw for name, dw in grads.items()}

    return gradient_of


def discriminates(state: State) -> bool:
    """Whether the discriminator counts in this step; never before the stage's length is known."""
    return state.total is not None and state.step >= state.config.adversarial_start * state.total


def adaptive_weight(of_error: Array, of_adversarial: Array) -> Array:
    """|∇ error| / (|∇ adversarial| + 1e-4), at most 1e4: both pull equally at the last kernel.

    The gradients are those of the decoder's last kernel (Esser et al. 2021, eq. 7; Rombach et al.
    2022, appendix G). A constant to the loss: nothing is differentiated through it.
    """
    ratio = global_norm({"": of_error}) / (global_norm({"": of_adversarial}) + 1e-4)
    return array_module(ratio).minimum(ratio, MAX_WEIGHT)


def train_step(
    state: State, gradient: Gradient, batch: tuple[Array, ...], rate: float, ema: float
) -> tuple[Array, Array]:
    """One step of the optimizer on one batch → loss and norm of the gradient, on the device.

    gradient: `gradient(batch) → (loss, gradients)` at the state's parameters. Where it has those of
    a discriminator too, that makes a step of its own optimizer.
    """
    loss, grads = gradient(batch)
    of_discriminator = {n: grads.pop(n) for n in state.discriminator if n in grads}
    norm = global_norm(grads)
    adamw(
        state.params, grads, state.moments, state.average, state.step, rate,
        scale=clip_factor(norm, MAX_NORM), ema=ema,
    )  # fmt: skip
    if of_discriminator:
        begun = math.ceil(state.config.adversarial_start * state.total)
        adamw(  # its average would be of no use: it stays the same as the parameters
            state.discriminator, of_discriminator, state.discriminator_moments,
            state.discriminator, max(0, state.step - begun), rate,
        )  # fmt: skip
    return loss, norm
