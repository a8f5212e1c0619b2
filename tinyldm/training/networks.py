"""The networks of a run, without parameters, and the losses that its config asks for."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from tinyldm.backend import Array, array_module
from tinyldm.checkpoints.components import make
from tinyldm.config import ConfigError
from tinyldm.data.class_names import ClassNames
from tinyldm.data.images import from_uint8, in_channels
from tinyldm.data.tokenizer import Tokenizer
from tinyldm.diffusion.loss import WEIGHTINGS, diffusion_loss
from tinyldm.diffusion.schedule import Schedule
from tinyldm.nn.protocol import Params
from tinyldm.training.adversarial import Adversarial, discriminator_loss, with_discriminator
from tinyldm.training.config import STAGES, Config, discriminator_of
from tinyldm.training.losses import (
    Features,
    autoencoder_loss,
    squared_error,
    with_perception,
)


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
            self.discriminator = discriminator_of(config)

    @property
    def stages(self) -> tuple[str, ...]:
        """Return the names of the stages that there are to train."""
        return STAGES if self.vae.shapes() else STAGES[1:]

    def init_denoiser(self, rng: Generator) -> Params:
        """Draw fresh parameters of all that stage 2 trains."""
        return self.unet.init(rng) | (self.text.init(rng) if self.text else {})

    def pixels(self, images: Array) -> Array:
        """Convert uint8 (n, h, w, 3) → what the first stage takes: −1…1, one channel if grey."""
        return in_channels(from_uint8(images), self.config.image_channels)

    def first_stage_loss(self) -> Callable | Adversarial:
        """Make the loss of stage 1 for a batch of images and, for a KL autoencoder, noise.

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

        # The codebook is learnt from its own loss alone, at full weight.
        weight = config.kl_weight if vae.draws_noise else 1.0

        def loss(criterion):
            return autoencoder_loss(vae, weight, criterion)

        if self.discriminator is None:
            return loss(criterion)
        return Adversarial(
            plain=loss(criterion),
            generator=loss(with_discriminator(criterion, self.discriminator)),
            discriminator=discriminator_loss(vae, criterion, self.discriminator),
        )


def denoiser_loss(models: Models, conditioner: Callable[..., Array] | None = None) -> Callable:
    """Make the diffusion loss of U-Net and text encoder, whose parameters share one dict.

    ids: token ids (n, l), or classes (n,). conditioner: maps the batch's conditioning arrays to the
    channels concatenated to the latents; None where there are none.
    """
    weighting = WEIGHTINGS[models.config.weighting]

    def loss_fn(params, z, noise, ids, t, *arrays):
        concat = [conditioner(*arrays)] if arrays else []
        condition = {"labels": ids}
        if models.text:
            context, text_back = models.text(params, ids)
            condition = {"context": context}

        def predict(x, t):
            if concat:
                x = array_module(x).concatenate([x, *concat], axis=-1)
            prediction, unet_back = models.unet(params, x, t, **condition)

            def backward(dprediction, grads):
                _, dcontext = unet_back(dprediction, grads)
                if models.text:
                    text_back(dcontext, grads)

            return prediction, backward

        return diffusion_loss(predict, models.schedule, z, noise, t, weighting)

    return loss_fn


def new_discriminator(models: Models) -> Params:
    """Draw fresh parameters of the discriminator, on the host; none where there is none."""
    if models.discriminator is None:
        return {}
    return models.discriminator.init(np.random.default_rng((models.config.seed, 7)))
