"""The losses of the first stage (Rombach et al. 2022, section 3.1 and appendix G).

A loss is `loss_fn(params, *batch) → (loss, backward(grads))`. Within it, a criterion says how far
reconstructions (n, h, w, c) are from their images, as a layer does: `criterion(params,
reconstruction, images) → (error, backward(grads) → dreconstruction)`.
"""

from collections.abc import Callable

from tinyldm.backend import Array
from tinyldm.models import AutoencoderKL, VQModel
from tinyldm.nn import functional as F
from tinyldm.nn import no_grad
from tinyldm.nn.norms import unit_norm
from tinyldm.nn.protocol import Backward, Params

# images (n, h, w, 3) → a list of maps (n, h', w', c), and backward(their gradients) → dimages
Features = Callable[[Array], tuple[list[Array], Backward]]


def squared_error(
    params: Params, reconstruction: Array, images: Array
) -> tuple[Array, Callable[[Params], Array]]:
    """Mean squared error, the criterion of every first stage."""
    error, error_back = F.mse(reconstruction, images)

    def backward(grads):
        dreconstruction, _ = error_back()
        return dreconstruction

    return error, backward


def autoencoder_loss(
    vae: AutoencoderKL | VQModel, weight: float, criterion: Callable = squared_error
) -> Callable:
    """Make the loss: reconstruction error + weight · what the first stage adds, see its `sample`.

    A batch holds images, noise for a first stage that draws it, and what else the criterion takes.
    """

    def loss_fn(params, images, *others):
        noise, *others = others if vae.draws_noise else (None, *others)
        z, penalty, sample_back = vae.sample(params, images, noise)
        reconstruction, decode_back = vae.decode(params, z)
        error, error_back = criterion(params, reconstruction, images, *others)

        def backward(grads):
            dz = decode_back(error_back(grads), grads)
            sample_back(dz, weight, grads)

        return error + weight * penalty, backward

    return loss_fn


# -------------------------------------------------------------------------------------- perceptual


def perceptual_loss(features: Features) -> Callable[[Array, Array], tuple[Array, Backward]]:
    """Make the perceptual distance between images: `distance(reconstruction, images)`.

    Its maps, each position's channels brought to length 1, are compared by squared difference:
    summed over channels, mean over positions and images, summed over maps. That is LPIPS (Zhang
    et al. 2018, eq. 1) without the weights learnt for each channel. backward(dloss = 1) gives the
    gradient of the reconstruction alone.
    """

    def distance(reconstruction, images):
        with no_grad():
            wanted = [unit_norm(h)[0] for h in features(images)[0]]
        maps, features_back = features(reconstruction)
        loss, backs = 0.0, []
        for h, target in zip(maps, wanted, strict=True):
            direction, norm_back = unit_norm(h)
            error, error_back = F.mse(direction, target)
            loss = loss + h.shape[-1] * error
            backs.append((h.shape[-1], error_back, norm_back))

        def backward(dloss=1.0):
            return features_back(
                [norm_back(error_back(c * dloss)[0]) for c, error_back, norm_back in backs]
            )

        return loss, backward

    return distance


def with_perception(criterion: Callable, features: Features, weight: float) -> Callable:
    """Add weight · perceptual loss to a criterion; grey images enter its network in 3 channels."""
    distance = perceptual_loss(features)

    def in_colour(x):
        return x.repeat(3, axis=-1) if x.shape[-1] == 1 else x

    def both(params, reconstruction, images):
        error, error_back = criterion(params, reconstruction, images)
        perceived, perceived_back = distance(in_colour(reconstruction), in_colour(images))

        def backward(grads):
            d = perceived_back(weight)
            grey = reconstruction.shape[-1] == 1
            return error_back(grads) + (d.sum(axis=-1, keepdims=True) if grey else d)

        return error + weight * perceived, backward

    return both
