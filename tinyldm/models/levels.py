"""The levels of the U-Net: all that happens at one size, on the way down and on the way up.

x (n, h, w, c), time (n, d) and context (n, l, d) are those of `blocks`. The backward passes return
dx, dtime and dcontext, which is None where nothing attends to the context.
"""

from tinyldm.backend import Array
from tinyldm.models.blocks import ResnetBlock, SpatialTransformer, Upsample, plus
from tinyldm.nn import functional as F
from tinyldm.nn.layers import Conv2d, Layer
from tinyldm.nn.protocol import Backward, Params


class UNetLayer(Layer):
    """A ResNet block and, where the level has attention, a spatial transformer."""

    def __init__(self, resnet: ResnetBlock, transformer: SpatialTransformer | None):
        self.resnet, self.attention = resnet, transformer

    def __call__(
        self, params: Params, x: Array, time: Array, context: Array | None
    ) -> tuple[Array, Backward]:
        h, resnet_back = self.resnet(params, x, time)
        if self.attention:
            h, attention_back = self.attention(params, h, context)

        def backward(dy, grads):
            dcontext = None
            if self.attention:
                dy, dcontext = attention_back(dy, grads)
            dx, dtime = resnet_back(dy, grads)
            return dx, dtime, dcontext

        return h, backward


def run_layers(
    layers: list[UNetLayer], params: Params, x: Array, time: Array, context: Array | None
) -> tuple[Array, Backward]:
    """Run the layers one after the other, as in the middle of the U-Net."""
    backs = []
    for layer in layers:
        x, layer_back = layer(params, x, time, context)
        backs.append(layer_back)

    def backward(dy, grads):
        dtime = dcontext = None
        for layer_back in reversed(backs):
            dy, dt, dc = layer_back(dy, grads)
            dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)
        return dy, dtime, dcontext

    return x, backward


class DownBlock(Layer):
    """Layers, then downsampling; everything on the way is a skip for the way up."""

    def __init__(self, layers: list[UNetLayer], down: Conv2d | None):
        self.layers, self.down = layers, down

    def __call__(
        self, params: Params, x: Array, time: Array, context: Array | None
    ) -> tuple[list[Array], Backward]:
        """Run the block → its skips, of which the last one is its result."""
        skips, backs = [], []
        for layer in self.layers:
            x, layer_back = layer(params, x, time, context)
            skips.append(x)
            backs.append(layer_back)
        if self.down:
            x, down_back = self.down(params, x)
            skips.append(x)

        def backward(dy, dskips, grads):
            """Return dx, dtime, dcontext; takes its own gradients from the end of `dskips`."""
            dtime = dcontext = None
            if self.down:
                dy = down_back(dy + dskips.pop(), grads)
            for layer_back in reversed(backs):
                dy, dt, dc = layer_back(dy + dskips.pop(), grads)
                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)
            return dy, dtime, dcontext

        return skips, backward


class UpBlock(Layer):
    """Layers, each joined by the skip of its size, then upsampling."""

    def __init__(self, layers: list[UNetLayer], up: Upsample | None):
        self.layers, self.up = layers, up

    def __call__(
        self,
        params: Params,
        x: Array,
        skips: list[Array],
        time: Array,
        context: Array | None,
        size: tuple[int, int] | None,
    ) -> tuple[Array, Backward]:
        """Run the block. `skips`: one a layer, newest first. `size`: of y, None for twice x."""
        backs = []
        for layer, skip in zip(self.layers, skips, strict=True):
            x, join_back = F.concatenate(x, skip)
            x, layer_back = layer(params, x, time, context)
            backs.append((join_back, layer_back))
        if self.up:
            x, up_back = self.up(params, x, size)

        def backward(dy, grads):
            """Return dx, the gradients of `skips` in their order, dtime, dcontext."""
            dskips, dtime, dcontext = [], None, None
            if self.up:
                dy = up_back(dy, grads)
            for join_back, layer_back in reversed(backs):
                dy, dt, dc = layer_back(dy, grads)
                dy, dskip = join_back(dy)
                dskips.insert(0, dskip)
                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)
            return dy, dskips, dtime, dcontext

        return x, backward
