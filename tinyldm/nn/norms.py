"""Normalisations: values moved to mean 0 and standard deviation 1, then scaled and shifted.

As in `functional`, each works in float32, float64 and complex128, with its backward pass.
"""

from tinyldm.backend import Array, array_module
from tinyldm.nn.activations import silu
from tinyldm.nn.protocol import Backward, differentiable


def normalise(x: Array, axes: tuple[int, ...], eps: float) -> tuple[Array, Backward]:
    """Normalise over `axes`: x̂ = (x − mean) / √(variance + eps); the shape stays.

    With r = 1 / √(variance + eps), the mean and the variance depend on every x of their set, so

        dx = r (dx̂ − mean(dx̂) − x̂ mean(dx̂ x̂))
    """
    centred = x - x.mean(axes, keepdims=True)
    centred -= centred.mean(axes, keepdims=True)  # the mean of large numbers was rounded
    variance = (centred * centred).mean(axes, keepdims=True)
    r = 1 / array_module(x).sqrt(variance + eps)
    x_hat = centred * r

    def backward(dx_hat):
        shift = dx_hat.mean(axes, keepdims=True)
        stretch = (dx_hat * x_hat).mean(axes, keepdims=True)
        return r * (dx_hat - shift - x_hat * stretch)

    return x_hat, backward


@differentiable
def group_norm(x: Array, w: Array, b: Array, groups: int, eps: float) -> tuple[Array, Backward]:
    """Normalise each group of channels over an image, scale, shift; x (n, ..., c), w and b (c,).

    y = w x̂ + b, x̂ normalised over all positions and the channels of a group (Wu & He 2018,
    section 3).
    """
    c = x.shape[-1]
    grouped = (len(x), -1, groups, c // groups)
    x_hat, normalise_back = normalise(x.reshape(grouped), (1, 3), eps)
    x_hat = x_hat.reshape(x.shape)

    def backward(dy, weights=True):
        dx = normalise_back((dy * w).reshape(grouped)).reshape(x.shape)
        if not weights:
            return dx, None, None
        dw = (dy * x_hat).reshape(-1, c).sum(axis=0)
        return dx, dw, dy.reshape(-1, c).sum(axis=0)

    return w * x_hat + b, backward


@differentiable
def group_norm_silu(
    x: Array, w: Array, b: Array, groups: int, eps: float
) -> tuple[Array, Backward]:
    """Compose `group_norm` and `silu`, the pair in front of every convolution of a ResNet block."""
    h, norm_back = group_norm(x, w, b, groups, eps)
    y, silu_back = silu(h)

    def backward(dy, weights=True):
        return norm_back(silu_back(dy), weights=weights)

    return y, backward


@differentiable
def layer_norm(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Backward]:
    """Normalise the last axis, scale, shift; x (..., d), w and b (d,) (Ba et al. 2016, eq. 3)."""
    d = x.shape[-1]
    x_hat, normalise_back = normalise(x, (-1,), eps)

    def backward(dy, weights=True):
        dx = normalise_back(dy * w)
        if not weights:
            return dx, None, None
        dw = (dy * x_hat).reshape(-1, d).sum(axis=0)
        return dx, dw, dy.reshape(-1, d).sum(axis=0)

    return w * x_hat + b, backward


@differentiable
def unit_norm(x: Array, eps: float = 1e-10) -> tuple[Array, Backward]:
    """Divide x (..., d) by its length, plus eps, along the last axis; at x = 0 the slope is 0.

    So features are compared by their direction alone (Zhang et al. 2018, section 3).
    """
    xp = array_module(x)
    length = xp.sqrt((x * x).sum(axis=-1, keepdims=True))
    scale = 1 / (length + eps)
    y = x * scale

    def backward(dy):
        # ∂length / ∂x = x / length
        along = (dy * y).sum(axis=-1, keepdims=True) * scale
        dx = scale * dy - x * (along / xp.where(length == 0, 1, length))
        return xp.where(length == 0, 0, dx)

    return y, backward
