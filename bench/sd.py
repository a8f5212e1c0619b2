"""Stable Diffusion 1.5 at full size, with random weights, beside PyTorch."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bench.compare import Rows, Run, row
from bench.measure import Step, entered
from bench.nets import (
    NetworkCase,
    Params,
    autoencoder_config,
    image_difference,
    random_params,
    unet_config,
)
from bench.sample import unet_pipeline
from tinyldm.backend import to_device
from tinyldm.models import AutoencoderKL, UNet
from tinyldm.nn import no_grad

ROUNDS = 3  # a call takes seconds


@dataclass(frozen=True)
class Prediction(NetworkCase):
    """The U-Net on the two samples that one image with guidance needs. context: (l, d)."""

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    side: int = 64
    context: tuple[int, int] = (77, 768)

    difference = staticmethod(image_difference)

    @property
    def name(self) -> str:
        """As in the table."""
        return f"U-Net {self.widths}×{self.layers}, {self.side}×{self.side}×4, batch 2"

    def config(self) -> dict:
        """diffusers'."""
        return unet_config(self.widths, self.layers, self.side, self.context[1])

    def params(self) -> Params:
        """Random ones."""
        return random_params(UNet(self.config()).shapes())

    def inputs(self) -> tuple:
        """Latents, time step, context."""
        rng = np.random.default_rng(1)
        z = rng.standard_normal((2, self.side, self.side, 4), np.float32)
        return z, 500, rng.standard_normal((2, *self.context), np.float32)

    def ours(self, params: Params, device: str) -> Step:
        """→ prediction."""
        z, t, context = self.inputs()
        pipe = unet_pipeline(self.config(), to_device(params, device), {})
        predict = entered(pipe.predictor(to_device(context, device)))
        return partial(predict, to_device(z, device), t)

    def theirs(self, params: Params, layout: str, device: str) -> Step:
        """The same with diffusers."""
        from bench import peer

        model = peer.load(peer.UNet2DConditionModel, self.config(), params, layout, device)
        z, t, context = self.inputs()
        z, context = (peer.tensor(a, layout, device) for a in (z, context))
        return peer.without_grad(lambda: model(z, t, context).sample)


@dataclass(frozen=True)
class Decoding(NetworkCase):
    """The autoencoder's way from the latents of one image to its pixels."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    side: int = 64

    difference = staticmethod(image_difference)

    @property
    def name(self) -> str:
        """As in the table."""
        pixels = self.side * 2 ** (len(self.widths) - 1)
        return f"decoder {self.widths}×{self.layers}, {self.side}×{self.side}×4 → {pixels}×{pixels}"

    def config(self) -> dict:
        """diffusers'."""
        return autoencoder_config(self.widths, self.layers, self.side)

    def params(self) -> Params:
        """Random ones."""
        return random_params(AutoencoderKL(self.config()).shapes())

    def latents(self) -> np.ndarray:
        """Draw the latents of one image, at the autoencoder's own scale."""
        return np.random.default_rng(1).standard_normal((1, self.side, self.side, 4), np.float32)

    def ours(self, params: Params, device: str) -> Step:
        """→ image."""
        vae, params = AutoencoderKL(self.config()), to_device(params, device)
        z = to_device(self.latents(), device)

        def step():
            with no_grad():
                return vae.decode(params, z)[0]

        return step

    def theirs(self, params: Params, layout: str, device: str) -> Step:
        """The same with diffusers."""
        from bench import peer

        model = peer.load(peer.AutoencoderKL, self.config(), params, layout, device)
        z = peer.tensor(self.latents(), layout, device)
        return peer.without_grad(lambda: model.decode(z).sample)


CASES = (Prediction(), Decoding())
TINY = (Prediction((32, 64), 1, 8, (7, 24)), Decoding((32, 32), 1, 8))


def table(run: Run) -> Rows:
    """Stable Diffusion 1.5

    Random weights. MB: the highest resident memory, weights and libraries included, of a process
    of its own that predicts (or decodes) twice. PyTorch's is in the format in which it is faster.
    Of the limit: SGEMM, with convolutions counted as direct ones.
    """

    def most(before, highest):
        return highest

    for case in TINY if run.tiny else CASES:
        yield row(case, replace(run, rounds=min(run.rounds, ROUNDS)), most)
