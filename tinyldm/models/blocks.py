"""Building blocks of the networks: ResNet blocks, attention, transformers, down- and upsampling.

x (n, h, w, c) features, time (n, d) the embedded time step, context (n, l, d) the embedded text.
Every parameter has the name it has in a checkpoint. A backward pass is its forward pass read
upwards; where an input is used twice its gradients are added.
"""

from collections.abc import Sequence
from functools import partial

from tinyldm.backend import Array
from tinyldm.config import ConfigError
from tinyldm.nn import functional as F
from tinyldm.nn.activations import geglu
from tinyldm.nn.attention import attention
from tinyldm.nn.conv import Padding
from tinyldm.nn.layers import Conv2d, GroupNorm, Initialiser, Layer, LayerNorm, Linear, Offset
from tinyldm.nn.protocol import Backward, Params


def plus(a: Array | None, b: Array | None) -> Array | None:
    """Add two gradients, either of which may be None."""
    return b if a is None else a if b is None else a + b


class ResnetBlock(Layer):
    """ResNet block: x + conv(silu(norm(conv(silu(norm(x))) + time))), diffusers' ResnetBlock2D.

    x (n, h, w, c_in), time (n, d_time) → (n, h, w, c_out); backward gives (dx, dtime). The time
    has already passed the SiLU that diffusers applies in every block. Where
    c_in ≠ c_out, x passes a 1×1 convolution before it is added (He et al. 2015, eq. 2).
    `init` is that of the last convolution: with zeros the block starts as the identity.
    """

    def __init__(
        self,
        name: str,
        c_in: int,
        c_out: int,
        groups: int,
        eps: float,
        d_time: int | None = None,
        init: Initialiser | None = None,
    ):
        self.norm1 = GroupNorm(f"{name}.norm1", c_in, groups, eps, silu=True)
        self.conv1 = Conv2d(f"{name}.conv1", c_in, c_out)
        self.time_proj = Linear(f"{name}.time_emb_proj", d_time, c_out) if d_time else None
        self.norm2 = GroupNorm(f"{name}.norm2", c_out, groups, eps, silu=True)
        self.conv2 = Conv2d(f"{name}.conv2", c_out, c_out, init=init)
        self.shortcut = (
            Conv2d(f"{name}.conv_shortcut", c_in, c_out, kernel=1) if c_in != c_out else None
        )

    def __call__(
        self, params: Params, x: Array, time: Array | None = None
    ) -> tuple[Array, Backward]:
        h, norm1_back = self.norm1(params, x)
        h, conv1_back = self.conv1(params, h)
        if self.time_proj:
            t, time_back = self.time_proj(params, time)
            h += t[:, None, None, :]
        h, norm2_back = self.norm2(params, h)
        h, conv2_back = self.conv2(params, h)
        if self.shortcut:
            x, shortcut_back = self.shortcut(params, x)
        h += x

        def backward(dy, grads):
            dx = shortcut_back(dy, grads) if self.shortcut else dy
            dh = norm2_back(conv2_back(dy, grads), grads)
            dtime = time_back(dh.sum(axis=(1, 2)), grads) if self.time_proj else None
            dh = norm1_back(conv1_back(dh, grads), grads)
            dh += dx
            return dh, dtime

        return h, backward


class Attention(Layer):
    """Multi-head attention from x (n, l, d) to the context (n, m, d_context), or to x itself.

    backward gives (dx, dcontext); dcontext is None without context. `names` are those of the
    projections q, k, v and out. Raises ConfigError where d does not divide into `heads`.
    """

    NAMES = ("to_q", "to_k", "to_v", "to_out.0")  # to_out.1 is dropout, without parameters

    def __init__(
        self,
        name: str,
        d: int,
        heads: int,
        d_context: int | None = None,
        bias: bool = False,
        causal: bool = False,
        names: Sequence[str] = NAMES,
    ):
        if d % heads:
            raise ConfigError(f"{name}: width {d} does not divide into {heads} heads")
        q, k, v, out = names
        self.to_q = Linear(f"{name}.{q}", d, d, bias)
        self.to_k = Linear(f"{name}.{k}", d_context or d, d, bias)
        self.to_v = Linear(f"{name}.{v}", d_context or d, d, bias)
        self.to_out = Linear(f"{name}.{out}", d, d)
        self.heads, self.causal = heads, causal

    def __call__(
        self, params: Params, x: Array, context: Array | None = None
    ) -> tuple[Array, Backward]:
        is_self = context is None
        source = x if is_self else context
        q, q_back = self.to_q(params, x)
        k, k_back = self.to_k(params, source)
        v, v_back = self.to_v(params, source)
        h, attend_back = attention(q, k, v, self.heads, self.causal)
        y, out_back = self.to_out(params, h)

        def backward(dy, grads):
            dq, dk, dv = attend_back(out_back(dy, grads))
            dx, dsource = q_back(dq, grads), k_back(dk, grads)
            dsource += v_back(dv, grads)
            if not is_self:
                return dx, dsource
            dx += dsource
            return dx, None

        return y, backward


class FeedForward(Layer):
    """Widen x (..., d) to twice 4d, gate, return to d (Shazeer 2020, eq. 6, with biases)."""

    def __init__(self, name: str, d: int):
        self.widen = Linear(f"{name}.net.0.proj", d, 8 * d)
        self.narrow = Linear(f"{name}.net.2", 4 * d, d)

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        h, widen_back = self.widen(params, x)
        h, gate_back = geglu(h)
        y, narrow_back = self.narrow(params, h)

        def backward(dy, grads):
            return widen_back(gate_back(narrow_back(dy, grads)), grads)

        return y, backward


class TransformerBlock(Layer):
    """Self-attention, cross-attention to the context, feed-forward, each as x + f(norm(x)).

    x (n, l, d), context (n, m, d_context); backward gives (dx, dcontext).
    """

    def __init__(self, name: str, d: int, heads: int, d_context: int):
        self.norm1 = LayerNorm(f"{name}.norm1", d)
        self.attn1 = Attention(f"{name}.attn1", d, heads)
        self.norm2 = LayerNorm(f"{name}.norm2", d)
        self.attn2 = Attention(f"{name}.attn2", d, heads, d_context)
        self.norm3 = LayerNorm(f"{name}.norm3", d)
        self.ff = FeedForward(f"{name}.ff", d)

    def __call__(self, params: Params, x: Array, context: Array) -> tuple[Array, Backward]:
        h, norm1_back = self.norm1(params, x)
        x1, attn1_back = self.attn1(params, h)
        x1 += x
        h, norm2_back = self.norm2(params, x1)
        x2, attn2_back = self.attn2(params, h, context)
        x2 += x1
        h, norm3_back = self.norm3(params, x2)
        y, ff_back = self.ff(params, h)
        y += x2

        def backward(dy, grads):
            dx2 = norm3_back(ff_back(dy, grads), grads)
            dx2 += dy
            dh, dcontext = attn2_back(dx2, grads)
            dx1 = norm2_back(dh, grads)
            dx1 += dx2
            dh, _ = attn1_back(dx1, grads)
            dx = norm1_back(dh, grads)
            dx += dx1
            return dx, dcontext

        return y, backward


class SpatialTransformer(Layer):
    """Spatial transformer: x + transformer blocks over its pixels, diffusers' Transformer2DModel.

    x (n, h, w, c), context (n, l, d_context); backward gives (dx, dcontext).
    """

    def __init__(
        self,
        name: str,
        c: int,
        heads: int,
        d_context: int,
        groups: int,
        layers: int = 1,
        linear_projection: bool = False,
    ):
        self.norm = GroupNorm(f"{name}.norm", c, groups, eps=1e-6)
        # The same mathematics; the checkpoint's shape differs.
        project = Linear if linear_projection else partial(Conv2d, kernel=1)
        self.proj_in = project(f"{name}.proj_in", c, c)
        self.blocks = [
            TransformerBlock(f"{name}.transformer_blocks.{i}", c, heads, d_context)
            for i in range(layers)
        ]
        self.proj_out = project(f"{name}.proj_out", c, c)

    def __call__(self, params: Params, x: Array, context: Array) -> tuple[Array, Backward]:
        n, height, w, c = x.shape
        h, norm_back = self.norm(params, x)
        h, in_back = self.proj_in(params, h)
        h = h.reshape(n, height * w, c)
        block_backs = []
        for block in self.blocks:
            h, block_back = block(params, h, context)
            block_backs.append(block_back)
        h, out_back = self.proj_out(params, h.reshape(n, height, w, c))

        def backward(dy, grads):
            dh = out_back(dy, grads).reshape(n, height * w, c)
            dcontext = None
            for block_back in reversed(block_backs):
                dh, dblock_context = block_back(dh, grads)
                dcontext = plus(dcontext, dblock_context)
            dx = norm_back(in_back(dh.reshape(n, height, w, c), grads), grads)
            dx += dy
            return dx, dcontext

        h += x
        return h, backward


class SpatialAttention(Layer):
    """Self-attention over the pixels with one head, plus x, as in the middle of the autoencoder."""

    def __init__(self, name: str, c: int, groups: int, eps: float):
        self.norm = GroupNorm(f"{name}.group_norm", c, groups, eps)
        self.attention = Attention(name, c, heads=1, bias=True)

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        n, height, w, c = x.shape
        h, norm_back = self.norm(params, x)
        h, attention_back = self.attention(params, h.reshape(n, height * w, c))

        def backward(dy, grads):
            dh, _ = attention_back(dy.reshape(n, height * w, c), grads)
            dx = norm_back(dh.reshape(n, height, w, c), grads)
            dx += dy
            return dx

        y = h.reshape(n, height, w, c)
        y += x
        return y, backward


class Upsample(Layer):
    """Repeat each pixel, then convolve: x (n, h, w, c) → (n, 2h, 2w, c), or to `size`."""

    def __init__(self, name: str, c: int):
        self.conv = Conv2d(f"{name}.upsamplers.0.conv", c, c)

    def __call__(
        self, params: Params, x: Array, size: tuple[int, int] | None = None
    ) -> tuple[Array, Backward]:
        h, repeat_back = F.upsample_nearest(x, size)
        y, conv_back = self.conv(params, h)

        def backward(dy, grads):
            return repeat_back(conv_back(dy, grads))

        return y, backward


def downsample(name: str, c: int, padding: Padding) -> Conv2d:
    """Halve height and width by a convolution with stride 2."""
    return Conv2d(f"{name}.downsamplers.0.conv", c, c, stride=2, padding=padding)


class AttentionPool(Layer):
    """Attention pooling of the text (n, l, d) → (n, 1, d): its mean attends to its tokens.

    diffusers' AttentionPooling, after DeepFloyd IF and CLIP's image encoder.
    """

    def __init__(self, name: str, d: int, heads: int):
        if d % heads:
            raise ConfigError(f"{name}: width {d} does not divide into {heads} heads")
        self.heads = heads
        self.q_proj = Linear(f"{name}.q_proj", d, d)
        self.k_proj = Linear(f"{name}.k_proj", d, d)
        self.v_proj = Linear(f"{name}.v_proj", d, d)
        self.position = Offset(f"{name}.positional_embedding", 1, d, std=d**-0.5)

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        mean, mean_back = F.mean(x, (1,))
        mean, position_back = self.position(params, mean)
        tokens, join_back = F.concatenate(mean, x, axis=1)
        q, q_back = self.q_proj(params, mean)
        k, k_back = self.k_proj(params, tokens)
        v, v_back = self.v_proj(params, tokens)
        y, attend_back = attention(q, k, v, self.heads)

        def backward(dy, grads):
            dq, dk, dv = attend_back(dy)
            dmean, dx = join_back(k_back(dk, grads) + v_back(dv, grads))
            dmean = position_back(dmean + q_back(dq, grads), grads)
            return dx + mean_back(dmean)

        return y, backward


class TextTimeEmbedding(Layer):
    """Pool the text to an addition to the time embedding: (n, l, d) → (n, d_time)."""

    def __init__(self, name: str, d: int, d_time: int, heads: int):
        self.norm1 = LayerNorm(f"{name}.norm1", d)
        self.pool = AttentionPool(f"{name}.pool", d, heads)
        self.proj = Linear(f"{name}.proj", d, d_time)
        self.norm2 = LayerNorm(f"{name}.norm2", d_time)

    def __call__(self, params: Params, context: Array) -> tuple[Array, Backward]:
        h, norm1_back = self.norm1(params, context)
        h, pool_back = self.pool(params, h)
        h, proj_back = self.proj(params, h)
        y, norm2_back = self.norm2(params, h)

        def backward(dy, grads):
            dh = proj_back(norm2_back(dy[:, None], grads), grads)
            return norm1_back(pool_back(dh, grads), grads)

        return y[:, 0], backward
