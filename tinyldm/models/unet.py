"""The denoiser: a U-Net with attention to text, diffusers' UNet2DConditionModel.

It goes down through ever smaller and deeper features, keeps each on a stack, and on the way up
joins them again (Ronneberger et al. 2015; Ho et al. 2020; Rombach et al. 2022, section 3.3).
"""

from typing import NamedTuple

from tinyldm.backend import Array
from tinyldm.config import ConfigError, per_block, read_config
from tinyldm.models.blocks import (
    ResnetBlock,
    SpatialTransformer,
    TextTimeEmbedding,
    Upsample,
    downsample,
    plus,
)
from tinyldm.models.levels import DownBlock, UNetLayer, UpBlock, run_layers
from tinyldm.nn import functional as F
from tinyldm.nn.activations import silu
from tinyldm.nn.layers import Conv2d, Embedding, GroupNorm, Layer, Linear, Recomputed, zeros
from tinyldm.nn.protocol import Backward, Params

DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,  # the *number* of heads: a slip that diffusers keeps for old files
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "num_class_embeds": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "time_embedding_dim": None,
}
FIXED = {
    "center_input_sample": [False],
    "only_cross_attention": [False],
    "downsample_padding": [1],
    "mid_block_scale_factor": [1],
    "dropout": [0.0],
    "act_fn": ["silu", "swish"],
    "reverse_transformer_layers_per_block": [None],
    "encoder_hid_dim": [None],
    "encoder_hid_dim_type": [None],
    "num_attention_heads": [None],
    "dual_cross_attention": [False],
    "class_embed_type": [None],
    "addition_time_embed_dim": [None],
    "upcast_attention": [False, True],  # about float16, which is not used here
    "resnet_time_scale_shift": ["default"],
    "resnet_skip_time_act": [False],
    "resnet_out_scale_factor": [1.0],
    "time_embedding_type": ["positional"],
    "time_embedding_act_fn": [None],
    "timestep_post_act": [None],
    "time_cond_proj_dim": [None],
    "projection_class_embeddings_input_dim": [None],
    "attention_type": ["default"],
    "class_embeddings_concat": [False],
    "mid_block_only_cross_attention": [None, False],
    "cross_attention_norm": [None],
}
# Block type → whether it has spatial transformers.
DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
MID = {None: None, "UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


class Level(NamedTuple):
    """Sizes of one level, and whether it attends to the context on the way down and up."""

    width: int  # channels
    layers: int
    heads: int
    d_context: int
    depth: int  # transformer blocks of a layer
    attends_down: bool
    attends_up: bool


def _levels(c):
    """Return the levels that a config asks for, from fine to coarse, checked."""
    widths, dims = list(c.block_out_channels), c.cross_attention_dim
    if isinstance(dims, (list, tuple)):
        c.cross_attention_dim = dims = list(dims)
        if dims != widths:
            raise ConfigError(
                f"unet config: cross_attention_dim = {dims} is not implemented, only one integer, "
                f"or {widths}, with which levels attend to themselves"
            )
        if c.addition_embed_type:
            raise ConfigError("unet config: addition_embed_type needs one cross_attention_dim")
    if c.addition_embed_type not in (None, "text"):
        raise ConfigError(
            f"unet config: addition_embed_type = {c.addition_embed_type!r} is not implemented, "
            "only None or 'text'"
        )
    sizes = {
        key: per_block("unet config", key, getattr(c, key), len(widths))
        for key in (
            "layers_per_block", "attention_head_dim", "cross_attention_dim",
            "transformer_layers_per_block", "down_block_types", "up_block_types",
        )
    }  # fmt: skip
    for key, known in (("down_block_types", DOWN), ("mid_block_type", MID), ("up_block_types", UP)):
        for kind in sizes.get(key, [c.mid_block_type]):
            read_config("unet config", {key: kind}, {}, {key: list(known)})
    for key in ("cross_attention_dim", "transformer_layers_per_block"):
        if not all(isinstance(number, int) for number in sizes[key]):
            raise ConfigError(f"unet config: {key} = {getattr(c, key)!r} is not implemented")
    before = widths[0]
    for width, layers in zip(widths, sizes["layers_per_block"], strict=True):
        if layers == 0 and width != before:
            raise ConfigError(
                f"unet config: a level of no layers leaves the {before} channels as they are, but "
                f"block_out_channels = {widths}"
            )
        before = width
    *numbers, down, up = sizes.values()
    attends = [DOWN[kind] for kind in down], [UP[kind] for kind in reversed(up)]
    return [Level(*level) for level in zip(widths, *numbers, *attends, strict=True)]


class UNet(Layer):
    """U-Net: unet(params, x, t, context, labels) → prediction of the shape of x, and backward.

    config: the keys of diffusers' UNet2DConditionModel; ConfigError names what is not implemented.
    """

    def __init__(self, config: dict):
        self.config = c = read_config("unet config", config, DEFAULTS, FIXED)
        levels = _levels(c)
        widest, narrowest = levels[-1], levels[0].width
        d_time = c.time_embedding_dim or 4 * narrowest

        def layer(name, i, c_in, level, attends):
            groups, transformer = c.norm_num_groups, None
            resnet = ResnetBlock(
                f"{name}.resnets.{i}", c_in, level.width, groups, c.norm_eps, d_time
            )
            if attends:
                transformer = SpatialTransformer(
                    f"{name}.attentions.{i}", level.width, level.heads, level.d_context, groups,
                    level.depth, c.use_linear_projection,
                )  # fmt: skip
            return UNetLayer(resnet, transformer)

        self.linear_1 = Linear("time_embedding.linear_1", narrowest, d_time)
        self.linear_2 = Linear("time_embedding.linear_2", d_time, d_time)
        self.class_embedding = self.add_embedding = None
        if c.num_class_embeds:
            self.class_embedding = Embedding("class_embedding", c.num_class_embeds, d_time)
        if c.addition_embed_type:
            self.add_embedding = TextTimeEmbedding(
                "add_embedding", c.cross_attention_dim, d_time, c.addition_embed_type_num_heads
            )

        padding = (c.conv_in_kernel - 1) // 2
        self.conv_in = Conv2d("conv_in", c.in_channels, narrowest, c.conv_in_kernel, 1, padding)
        skip_widths = [narrowest]
        self.down_blocks = []
        for i, level in enumerate(levels):
            name, layers, down = f"down_blocks.{i}", [], None
            for j in range(level.layers):
                layers.append(layer(name, j, skip_widths[-1], level, level.attends_down))
                skip_widths.append(level.width)
            if level is not widest:
                down = downsample(name, level.width, 1)
                skip_widths.append(level.width)
            self.down_blocks.append(DownBlock(layers, down))

        self.mid_layers = []
        if c.mid_block_type:
            attends = MID[c.mid_block_type]
            self.mid_layers = [
                layer("mid_block", i, widest.width, widest, attends and i == 0)
                for i in range(1 + attends)
            ]

        width = widest.width
        self.up_blocks = []
        for i, level in enumerate(reversed(levels)):
            name, layers = f"up_blocks.{i}", []
            for j in range(level.layers + 1):
                layers.append(layer(name, j, width + skip_widths.pop(), level, level.attends_up))
                width = level.width
            up = Upsample(name, width) if level is not levels[0] else None
            self.up_blocks.append(UpBlock(layers, up))

        self.norm_out = GroupNorm("conv_norm_out", narrowest, c.norm_num_groups, c.norm_eps, True)
        kernel = c.conv_out_kernel
        self.conv_out = Conv2d(
            "conv_out", narrowest, c.out_channels, kernel, 1, (kernel - 1) // 2, init=zeros
        )
        layers = [s for block in [*self.down_blocks, *self.up_blocks] for s in block.layers]
        attends = any(s.attention for s in layers + self.mid_layers)
        # Without a context each position attends to the others once more, as in diffusers.
        to_itself = isinstance(c.cross_attention_dim, list)
        self.needs_context = (attends and not to_itself) or self.add_embedding is not None

    def recompute(self) -> None:
        """Keep no activations inside a layer from now on: less memory, one more forward pass."""
        for block in [*self.down_blocks, *self.up_blocks]:
            block.layers = [Recomputed(layer) for layer in block.layers]
        self.mid_layers = [Recomputed(layer) for layer in self.mid_layers]

    def __call__(
        self,
        params: Params,
        x: Array,
        t: Array,
        context: Array | None = None,
        labels: Array | None = None,
    ) -> tuple[Array, Backward]:
        """Predict ε, x_0 or v at x (n, h, w, c), t (n,), for context (n, l, d), class labels (n,).

        Where cross_attention_dim lists the widths of the levels there is no context: the levels
        attend to themselves.
        backward(dy, grads) → (dx, dcontext); dcontext is None without context. Raises ValueError
        for an input that is missing, superfluous or misshapen.
        """
        self._check_inputs(x, t, context, labels)
        time, time_back = self._embed_time(params, x, t, context, labels)
        h, in_back = self.conv_in(params, x)
        skips, down_backs, up_backs = [h], [], []
        for block in self.down_blocks:
            new, block_back = block(params, h, time, context)
            h = new[-1]
            skips += new
            down_backs.append(block_back)
        h, mid_back = run_layers(self.mid_layers, params, h, time, context)
        for block in self.up_blocks:
            count = len(block.layers)
            skips, taken = skips[:-count], skips[: -count - 1 : -1]  # the last ones, newest first
            size = skips[-1].shape[1:3] if skips else None
            h, block_back = block(params, h, taken, time, context, size)
            up_backs.append(block_back)
        h, norm_back = self.norm_out(params, h)
        y, out_back = self.conv_out(params, h)

        def backward(dy, grads):
            dh = norm_back(out_back(dy, grads), grads)
            dskips, dtime, dcontext = [], None, None
            for block_back in reversed(up_backs):
                dh, dtaken, dt, dc = block_back(dh, grads)
                dskips += reversed(dtaken)
                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)
            dh, dt, dc = mid_back(dh, grads)
            dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)
            for block_back in reversed(down_backs):
                dh, dt, dc = block_back(dh, dskips, grads)
                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)
            dx = in_back(dh + dskips.pop(), grads)
            return dx, plus(dcontext, time_back(dtime, grads))

        return y, backward

    def _embed_time(self, params, x, t, context, labels):
        """Embed the time step, and with it label and pooled text, as one vector (n, d_time)."""
        c = self.config
        waves = F.time_embedding(t, self.linear_1.d_in, c.flip_sin_to_cos, c.freq_shift)
        h, back_1 = self.linear_1(params, waves.astype(x.dtype))
        h, silu_back = silu(h)
        time, back_2 = self.linear_2(params, h)
        if self.class_embedding:
            label, label_back = self.class_embedding(params, labels)
            time = time + label
        if self.add_embedding:
            text, text_back = self.add_embedding(params, context)
            time = time + text
        time, time_back = silu(time)  # once for all ResNet blocks

        def backward(dtime, grads):
            dtime = time_back(dtime)
            if self.class_embedding:
                label_back(dtime, grads)
            dcontext = text_back(dtime, grads) if self.add_embedding else None
            back_1(silu_back(back_2(dtime, grads)), grads)  # integers have no gradient
            return dcontext

        return time, backward

    def _check_inputs(self, x, t, context, labels):
        c = self.config
        if x.ndim != 4 or x.shape[3] != c.in_channels:
            raise ValueError(f"unet: expected x (n, h, w, {c.in_channels}), found {x.shape}")
        n = x.shape[0]
        if t.shape != (n,):
            raise ValueError(f"unet: expected t ({n},), found {t.shape}")
        if self.needs_context and context is None:
            raise ValueError("unet: this model attends to text and needs context (n, l, d)")
        d = c.cross_attention_dim
        if context is not None and isinstance(d, list):
            raise ValueError("unet: context was given, but each level attends to itself")
        if context is not None and (context.ndim != 3 or context.shape[::2] != (n, d)):
            raise ValueError(f"unet: expected context ({n}, l, {d}), found {context.shape}")
        if (labels is None) == bool(self.class_embedding):
            raise ValueError(
                "unet: this model needs labels (n,)" if labels is None
                else "unet: labels were given, but num_class_embeds is not set"
            )  # fmt: skip
        if labels is not None and labels.shape != (n,):
            raise ValueError(f"unet: expected labels ({n},), found {labels.shape}")
