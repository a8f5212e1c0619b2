"""The levels of the U-Net: all that happens at one size, on the way down and on the way up.

x (n, h, w, c), time (n, d) and context (n, l, d) are those of `blocks`. The backward passes return
dx, dtime and dcontext, which is None where nothing attends to the context.
"""

from tinyldm.backend import Array
from tinyldm.models.blocks import ResnetBlock, SpatialTransformer, Upsample, plus
from tinyldm.nn import functional as F
from tinyldm.nn.layers import Conv2d, Layer
from tinyldm.nn.protocol import Backward, Params


class Stage(Layer):
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


def run_stages(
    stages: list[Stage], params: Params, x: Array, time: Array, context: Array | None
) -> tuple[Array, Backward]:
    """The stages one after the other, as in the middle of the U-Net."""
    backs = []
    for stage in stages:
        x, stage_back = stage(params, x, time, context)
        backs.append(stage_back)

    def backward(dy, grads):
        dtime = dcontext = None
        for stage_back in reversed(backs):
            dy, dt, dc = stage_back(dy, grads)
            dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)
        return dy, dtime, dcontext

    return x, backward


class DownBlock(Layer):
    """Stages, then half the size; everything on the way is a skip for the way up."""

    def __init__(self, stages: list[Stage], down: Conv2d | None):
        self.stages, self.down = stages, down

    def __call__(
        self, params: Params, x: Array, time: Array, context: Array | None
    ) -> tuple[list[Array], Backward]:
        """→ the skips, of which the last one is the block's result."""
        skips, backs = [], []
        for stage in self.stages:
            x, stage_back = stage(params, x, time, context)
            skips.append(x)
            backs.append(stage_back)
        if self.down:
            x, down_back = self.down(params, x)
            skips.append(x)

        def backward(dy, dskips, grads):
            """→ dx, dtime, dcontext; takes this block's own gradients from the end of `dskips`."""
            dtime = dcontext = None
            if self.down:
                dy = down_back(dy + dskips.pop(), grads)
            for stage_back in reversed(backs):
                dy, dt, dc = stage_back(dy + dskips.pop(), grads)
                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)
            return dy, dtime, dcontext

        return skips, backward


class UpBlock(Layer):
    """Stages, each joined by the skip of its size, then twice the size."""

    def __init__(self, stages: list[Stage], up: Upsample | None):
        self.stages, self.up = stages, up

    def __call__(
        self,
        params: Params,
        x: Array,
        skips: list[Array],
        time: Array,
        context: Array | None,
        size: tuple[int, int] | None,
    ) -> tuple[Array, Backward]:
        """`skips`: one a stage, the last one down first. `size`: (h, w) of y, None for twice x."""
        backs = []
        for stage, skip in zip(self.stages, skips, strict=True):
            x, join_back = F.concatenate(x, skip)
            x, stage_back = stage(params, x, time, context)
            backs.append((join_back, stage_back))
        if self.up:
            x, up_back = self.up(params, x, size)

        def backward(dy, grads):
            """→ dx, the gradients of `skips` in their order, dtime, dcontext."""
            dskips, dtime, dcontext = [], None, None
            if self.up:
                dy = up_back(dy, grads)
            for join_back, stage_back in reversed(backs):
                dy, dt, dc = stage_back(dy, grads)
                dy, dskip = join_back(dy)
                dskips.insert(0, dskip)
                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)
            return dy, dskips, dtime, dcontext

        return x, backward
