"""Patch discriminator: real or decoded? By deceiving it a decoder learns detail."""

from tinyldm.backend import Array
from tinyldm.nn.activations import leaky_relu
from tinyldm.nn.layers import Conv2d, GroupNorm, Layer
from tinyldm.nn.protocol import Backward, Params

KERNEL = 4
WIDEST = 8  # times the width of the first convolution
EPS = 1e-5  # of every group norm


class PatchDiscriminator(Layer):
    """Patch discriminator: images (n, h, w, c_in) → logits (n, h', w', 1), high where real.

    `layers` convolutions of stride 2 and two of stride 1, all 4×4 (Isola et al. 2017, section 6.1;
    latent diffusion's NLayerDiscriminator). The receptive field of a logit is 34 pixels wide with
    two layers, 70 with three. GroupNorm replaces BatchNorm: with statistics of
    the batch, a batch split over cores or into parts would have other gradients than the whole.

    Raises ValueError, as `conv2d` does, for images that are too small: 16 pixels will do for two
    layers.
    """

    def __init__(self, name: str, c_in: int, width: int, groups: int, layers: int = 2):
        widths = [width * min(2**i, WIDEST) for i in range(layers + 1)]
        strides = [2] * layers + [1, 1]
        sizes = zip([c_in, *widths], [*widths, 1], strides, strict=True)
        self.convs = [
            Conv2d(f"{name}.convs.{i}", before, after, KERNEL, stride, padding=1)
            for i, (before, after, stride) in enumerate(sizes)
        ]
        self.norms = [
            GroupNorm(f"{name}.norms.{i}", after, groups, EPS)
            for i, after in enumerate(widths[1:], start=1)
        ]

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        first, *middle, last = self.convs
        x, first_back = first(params, x)
        x, first_bend_back = leaky_relu(x)
        backs = []
        for conv, norm in zip(middle, self.norms, strict=True):
            x, conv_back = conv(params, x)
            x, norm_back = norm(params, x)
            x, bend_back = leaky_relu(x)
            backs.append((conv_back, norm_back, bend_back))
        logits, last_back = last(params, x)

        def backward(dlogits, grads):
            dx = last_back(dlogits, grads)
            for conv_back, norm_back, bend_back in reversed(backs):
                dx = conv_back(norm_back(bend_back(dx), grads), grads)
            return first_back(first_bend_back(dx), grads)

        return logits, backward
