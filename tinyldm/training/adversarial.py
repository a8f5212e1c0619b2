"""Training a first stage against a discriminator (Esser et al. 2021, "Taming transformers")."""

from collections.abc import Callable
from dataclasses import dataclass

from tinyldm.backend import Array, array_module
from tinyldm.models import AutoencoderKL, VQModel
from tinyldm.models.discriminator import PatchDiscriminator
from tinyldm.nn import Grads, no_grad
from tinyldm.nn import functional as F
from tinyldm.nn.optim import MAX_NORM, clip_factor, global_norm
from tinyldm.nn.protocol import add_grad
from tinyldm.training.state import State

MAX_WEIGHT = 1e4  # of the discriminator

Gradient = Callable[[tuple[Array, ...]], tuple[Array, dict[str, Array]]]  # batch → loss, gradients

# Names of gradients of the decoder's last kernel, by which the adaptive weight is found.
OF_ERROR, OF_ADVERSARIAL = "last kernel: of the error", "last kernel: of the adversarial part"


@dataclass(frozen=True)
class Adversarial:
    """The losses of a first stage with a discriminator, whose parameters are in the same dict."""

    plain: Callable  # of the autoencoder, until the discriminator has begun
    generator: Callable  # of the autoencoder, the discriminator frozen; see `with_discriminator`
    discriminator: Callable  # its own, the autoencoder frozen; see `discriminator_loss`


def with_discriminator(criterion: Callable, discriminator: PatchDiscriminator) -> Callable:
    """Return the criterion − weight · mean logit of the reconstructions, which are to look real.

    The criterion takes the weight (n,), equal for all of a batch, after the images. The
    discriminator gets no gradient.
    """

    def both(params, reconstruction, images, weight):
        error, error_back = criterion(params, reconstruction, images)
        logits, logits_back = discriminator(params, reconstruction)
        adversarial, adversarial_back = F.weighted_mean(logits, -weight)

        def backward(grads):
            return error_back(grads) + logits_back(adversarial_back(), None)

        return error + adversarial, backward

    return both


def discriminator_loss(
    vae: AutoencoderKL | VQModel, criterion: Callable, discriminator: PatchDiscriminator
) -> Callable:
    """Make the discriminator's hinge loss on images and their reconstructions.

    The reconstructions pass no gradient on to the autoencoder. Besides its parameters' gradients,
    backward(grads) gives two that set the weight in the autoencoder's next step: of the decoder's
    last kernel, of the criterion (OF_ERROR) and of −mean logit (OF_ADVERSARIAL). Both are means
    over the batch, like all gradients, and so the same however the batch is split.
    """
    last = vae.decoder.conv_out

    def loss_fn(params, images, *noise):
        with no_grad():
            z, *_ = vae.sample(params, images, *noise)
            features, _ = vae.decode_features(params, z)
        reconstruction, error_last_back = last(params, features)
        _, adversarial_last_back = last(params, features)
        _, error_back = criterion(params, reconstruction, images)
        logits, logits_back = discriminator(params, reconstruction)
        _, adversarial_back = F.weighted_mean(logits, -1.0)
        real, real_back = discriminator(params, images)
        fake, fake_back = discriminator(params, reconstruction)
        loss, hinge_back = F.hinge(real, fake)

        def of_last(last_back, dreconstruction):
            grads = Grads([last.weight])
            last_back(dreconstruction, grads)
            return grads[last.weight]

        def backward(grads):
            dadversarial = logits_back(adversarial_back(), None)
            add_grad(grads, OF_ERROR, of_last(error_last_back, error_back(None)))
            add_grad(grads, OF_ADVERSARIAL, of_last(adversarial_last_back, dadversarial))
            dreal, dfake = hinge_back()
            real_back(dreal, grads)
            fake_back(dfake, grads)

        return loss, backward

    return loss_fn


def alternating(
    state: State,
    numbers: dict[str, Array],
    plain: Gradient,
    generator: Gradient,
    discriminator: Gradient,
) -> Gradient:
    """Compute both gradients of a step, each network's with the other one frozen.

    Both are taken before either network moves, so the discriminator sees exactly the
    reconstructions that the generator loss was computed on. Its gradient is clipped here, on its
    own. numbers: receives further values of a step.
    """

    def gradient_of(batch):
        if not discriminates(state):
            return plain(batch)
        d_loss, grads = discriminator(batch)
        weight = adaptive_weight(grads.pop(OF_ERROR), grads.pop(OF_ADVERSARIAL))
        norm = global_norm(grads)
        factor = clip_factor(norm, MAX_NORM)
        xp = array_module(weight)
        weights = xp.ones(len(batch[0]), weight.dtype) * (state.config.adversarial * weight)
        loss, of_autoencoder = generator((*batch, weights))
        numbers.update(discriminator=d_loss, discriminator_norm=norm, adaptive_weight=weight)
        return loss, of_autoencoder | {name: factor * dw for name, dw in grads.items()}

    return gradient_of


def discriminates(state: State) -> bool:
    """Return whether the discriminator counts in this step; never before the length is known."""
    return state.total is not None and state.step >= state.config.adversarial_start * state.total


def adaptive_weight(of_error: Array, of_adversarial: Array) -> Array:
    """Adaptive weight |∇ error| / (|∇ adversarial| + 1e-4), at most 1e4: both pull equally.

    The gradients are those of the decoder's last kernel (Esser et al. 2021, eq. 7; Rombach et al.
    2022, appendix G). A constant to the loss: nothing is differentiated through it.
    """
    ratio = global_norm({"": of_error}) / (global_norm({"": of_adversarial}) + 1e-4)
    return array_module(ratio).minimum(ratio, MAX_WEIGHT)
