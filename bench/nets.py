"""The train steps that are compared: a U-Net and an autoencoder, here and in diffusers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.compare import relative
from bench.measure import Limits, Step, entered
from tinyldm.backend import Array, to_device
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.models import AutoencoderKL, UNet
from tinyldm.nn import functional as F
from tinyldm.training.losses import autoencoder_loss
from tinyldm.training.step import gradient

Params = dict[str, Array]


def random_params(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Params:
    """Weights that are random everywhere.

    Also where training starts from 0 or 1: there, an error in all that comes before would not show.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes.items():
        w = params[name] = rng.random(shape, np.float32)  # far faster than a normal distribution
        w -= 0.5
        if len(shape) > 1:
            fan_in = math.prod(shape[:-1]) if len(shape) == 4 else shape[-1]
            w *= math.sqrt(12 / fan_in)
        elif name.endswith(".weight"):  # of a norm
            w += 1
    return params


def unet_config(widths: tuple[int, ...], layers: int, side: int, d: int) -> dict:
    """Of the shape of Stable Diffusion's: attention to text (n, l, d) but at the lowest level."""
    attending = len(widths) - 1
    return {
        "sample_size": side,
        "down_block_types": ["CrossAttnDownBlock2D"] * attending + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attending,
        "block_out_channels": list(widths),
        "layers_per_block": layers,
        "cross_attention_dim": d,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
    }


def autoencoder_config(widths: tuple[int, ...], layers: int, side: int) -> dict:
    """Of the shape of Stable Diffusion's: four latent channels, attention in the middle."""
    return {
        "sample_size": side,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": list(widths),
        "layers_per_block": layers,
        "latent_channels": 4,
        "norm_num_groups": 32,
    }


def step_difference(ours: Sequence, theirs: Sequence) -> float:
    """Of (loss, {name: gradient}): the larger of both, the gradient being one long vector."""
    (loss, grads), (their_loss, their_grads) = ours, theirs
    if grads.keys() != their_grads.keys():
        raise SystemExit(f"only one side has {sorted(grads.keys() ^ their_grads.keys())}")
    flat = (
        np.concatenate([side[name].ravel() for name in sorted(side)])
        for side in (grads, their_grads)
    )
    return max(relative(loss, their_loss), relative(*flat))


def image_difference(ours: Array, theirs: Any) -> float:
    """Relative difference to PyTorch's, of images (n, h, w, c)."""
    from bench.peer import to_numpy

    return relative(to_device(ours, "cpu"), to_numpy(theirs))


class NetworkCase:
    """What the cases with a network share: its limit is that of matrix products."""

    layouts = ("contiguous", "channels_last")

    def least_seconds(self, limits: Limits, theirs: Step | None) -> float | None:
        """Counted by PyTorch, so unknown without it."""
        if theirs is None:
            return None
        from bench import peer

        return theirs.ask(peer.flops) / limits.flops


class TrainStep(NetworkCase):
    """The loss of a batch and all gradients. A subclass has net, batch and loss."""

    def params(self) -> Params:
        """Random ones."""
        return random_params(self.net().shapes())

    def ours(self, params: Params, device: str) -> Step:
        """→ loss, {name: gradient}, as in a run."""
        params = Flat(to_device(params, device), shared=True)
        batch = tuple(to_device(x, device) for x in self.batch())
        return partial(entered(gradient(self.loss(), params)), batch)

    def difference(self, ours: tuple, theirs: tuple) -> float:
        """Relative."""
        from bench.peer import KERNEL, to_numpy

        loss, grads = theirs
        grads = {name: to_numpy(dw, KERNEL) for name, dw in grads.items()}
        return step_difference([to_device(x, "cpu") for x in ours], (to_numpy(loss), grads))


@dataclass(frozen=True)
class UNetStep(TrainStep):
    """side: of latents with 4 channels. context: (l, d)."""

    widths: tuple[int, ...]
    layers: int
    side: int
    samples: int
    context: tuple[int, int]

    @property
    def name(self) -> str:
        """As in the table."""
        return f"U-Net {self.widths}×{self.layers}, {self.side}×{self.side}×4, batch {self.samples}"

    def config(self) -> dict:
        """diffusers'."""
        return unet_config(self.widths, self.layers, self.side, self.context[1])

    def net(self) -> UNet:
        """Ours."""
        return UNet(self.config())

    def batch(self) -> list[Array]:
        """Latents, what to predict, context, time steps."""
        rng = np.random.default_rng(1)
        shape = (self.samples, self.side, self.side, 4)
        z, target = (rng.standard_normal(shape, np.float32) for _ in range(2))
        context = rng.standard_normal((self.samples, *self.context), np.float32)
        return [z, target, context, rng.integers(0, 1000, self.samples)]

    def loss(self) -> Callable:
        """For `gradient`."""
        net = self.net()

        def loss_fn(params, z, target, context, t):
            prediction, unet_back = net(params, z, t, context)
            loss, loss_back = F.mse(prediction, target)
            return loss, lambda grads: unet_back(loss_back()[0], grads)

        return loss_fn

    def theirs(self, params: Params, layout: str, device: str) -> Step:
        """The same with diffusers."""
        from bench import peer

        model = peer.load(peer.UNet2DConditionModel, self.config(), params, layout, device)
        z, target, context, t = (peer.tensor(a, layout, device) for a in self.batch())
        return peer.train_step(
            model, lambda: (model(z, t, context).sample - target).square().mean()
        )


@dataclass(frozen=True)
class AutoencoderStep(TrainStep):
    """side: of images with 3 channels."""

    widths: tuple[int, ...]
    layers: int
    side: int
    samples: int

    @property
    def name(self) -> str:
        """As in the table."""
        side = f"{self.side}×{self.side}×3"
        return f"autoencoder {self.widths}×{self.layers}, {side}, batch {self.samples}"

    def config(self) -> dict:
        """diffusers'."""
        return autoencoder_config(self.widths, self.layers, self.side)

    def net(self) -> AutoencoderKL:
        """Ours."""
        return AutoencoderKL(self.config())

    def batch(self) -> list[Array]:
        """Images, and the noise with which latents are drawn."""
        rng = np.random.default_rng(1)
        small = self.side // self.net().factor
        images = rng.standard_normal((self.samples, self.side, self.side, 3), np.float32)
        return [images, rng.standard_normal((self.samples, small, small, 4), np.float32)]

    def loss(self) -> Callable:
        """For `gradient`."""
        return autoencoder_loss(self.net(), weight=0.0)

    def theirs(self, params: Params, layout: str, device: str) -> Step:
        """The same with diffusers."""
        from bench import peer

        model = peer.load(peer.AutoencoderKL, self.config(), params, layout, device)
        images, noise = (peer.tensor(a, layout, device) for a in self.batch())

        def loss_fn():
            posterior = model.encode(images).latent_dist
            reconstruction = model.decode(posterior.mean + posterior.std * noise).sample
            return (reconstruction - images).square().mean()

        return peer.train_step(model, loss_fn)
