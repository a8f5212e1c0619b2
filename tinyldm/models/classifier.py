"""A small ResNet classifier, whose features compare images: those that look alike are near.

He et al. 2015 with the ResNet blocks of the autoencoder; every attribute of an image has a linear
layer of its own, on features that all share.
"""

from tinyldm.backend import Array
from tinyldm.config import ConfigError, read_config
from tinyldm.models.blocks import downsample, plus
from tinyldm.models.coders import TimelessResnet
from tinyldm.nn import functional as F
from tinyldm.nn.layers import Conv2d, GroupNorm, Layer, Linear, zeros
from tinyldm.nn.protocol import Backward, Params

DEFAULTS = {
    "in_channels": 3,
    "widths": [16, 32, 64, 64],  # channels of each level; the sides halve from one to the next
    "norm_num_groups": 8,
    "stride": 1,  # of the first convolution, as in AlexNet: large images become small at once
    "classes": {},  # {attribute: the words that it can take}
}
EPS = 1e-6  # of every group norm
HALVING = (0, 1, 0, 1)  # padding with which a stride of 2 turns h into h // 2, also of an odd h


class Classifier(Layer):
    """Classifier: images (n, h, w, in_channels) → logits (n, words) for each attribute.

    A side of h pixels has h // stride at the first level, and at the last 1 or more: ValueError
    for smaller images, ConfigError for a config without classes.
    """

    def __init__(self, config: dict):
        self.config = c = read_config("classifier config", config, DEFAULTS, {})
        if not c.classes or not all(c.classes.values()):
            raise ConfigError("classifier config: expected words for each of its classes")
        groups, before = c.norm_num_groups, c.widths[0]
        self.least = c.stride * 2 ** (len(c.widths) - 1)
        self.conv_in = Conv2d("conv_in", c.in_channels, before, c.stride + 2, c.stride, padding=1)
        self.resnets, self.downsamplers = [], []
        for level, width in enumerate(c.widths):
            if level:
                self.downsamplers.append(downsample(f"blocks.{level - 1}", before, HALVING))
            name = f"blocks.{level}.resnet"
            self.resnets.append(TimelessResnet(name, before, width, groups, EPS, init=zeros))
            before = width
        self.norm_out = GroupNorm("norm_out", before, groups, EPS, silu=True)
        self.heads = [Linear(f"heads.{name}", before, len(c.classes[name])) for name in c.classes]

    def features(self, params: Params, x: Array) -> tuple[list[Array], Backward]:
        """Compute the features of every level, (n, h, w, c) each, from fine to coarse.

        backward(dys, grads) → dx takes the gradient of each, or None where there is none.
        """
        if x.ndim != 4 or min(x.shape[1:3]) < self.least:
            raise ValueError(
                "classifier: expected images (n, h, w, c) of at least "
                f"{self.least}×{self.least}, found {x.shape}"
            )
        h, in_back = self.conv_in(params, x)
        maps, backs = [], []
        for level, resnet in enumerate(self.resnets):
            down_back = None
            if level:
                h, down_back = self.downsamplers[level - 1](params, h)
            h, resnet_back = resnet(params, h)
            maps.append(h)
            backs.append((down_back, resnet_back))

        def backward(dys, grads):
            dh = None
            for dy, (down_back, resnet_back) in zip(reversed(dys), reversed(backs), strict=True):
                dh = plus(dh, dy)
                if dh is not None:
                    dh = resnet_back(dh, grads)
                    dh = down_back(dh, grads) if down_back else dh
            return in_back(dh, grads)

        return maps, backward

    def pooled(self, params: Params, x: Array) -> tuple[Array, Backward]:
        """Normalise the features of the last level and average them over positions: (n, d)."""
        maps, features_back = self.features(params, x)
        h, norm_back = self.norm_out(params, maps[-1])
        y, mean_back = F.mean(h, (1, 2))
        finer = [None] * (len(maps) - 1)

        def backward(dy, grads):
            dh = mean_back(dy[:, None, None])
            return features_back([*finer, norm_back(dh, grads)], grads)

        return y[:, 0, 0], backward

    def __call__(self, params: Params, x: Array) -> tuple[list[Array], Backward]:
        pooled, pooled_back = self.pooled(params, x)
        logits, backs = zip(*(head(params, pooled) for head in self.heads), strict=True)

        def backward(dlogits, grads):
            dpooled = None
            for dy, head_back in zip(dlogits, backs, strict=True):
                dpooled = plus(dpooled, head_back(dy, grads))
            return pooled_back(dpooled, grads)

        return list(logits), backward
