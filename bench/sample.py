"""Sampling beside PyTorch: one step with the demo's U-Net."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.compare import Rows, Run, speed
from bench.measure import Step, entered
from bench.nets import NetworkCase, Params, image_difference, random_params
from tinyldm.backend import Array, array_module, to_device
from tinyldm.diffusion.guidance import guided
from tinyldm.diffusion.samplers import ddim
from tinyldm.models import UNet
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.config import Config
from tinyldm.training.presets import PRESETS


def unet_pipeline(config: dict, params: Params, scheduler: dict) -> Pipeline:
    """A pipeline that can predict, and no more: what it runs is what users run."""
    configs = {"unet": config, "vae": {}, "text_encoder": {}, "scheduler": scheduler}
    return Pipeline(configs, {"unet": params}, tokenizer=None)


@dataclass(frozen=True)
class SamplingStep(NetworkCase):
    """Predictions with and without text as one batch, guidance, one step of DDIM."""

    preset: str
    images: int

    difference = staticmethod(image_difference)

    @property
    def name(self) -> str:
        """As in the table."""
        c = self.config
        side = c.unet_config()["sample_size"]
        return f"U-Net {c.unet_widths}, {side}×{side}, {self.images} × 2 predictions"

    @property
    def config(self) -> Config:
        """Of the preset."""
        return PRESETS[self.preset]

    def params(self) -> Params:
        """Random ones."""
        return random_params(UNet(self.config.unet_config()).shapes())

    def inputs(self) -> list[Array]:
        """Noise; the context of no text, and that of a text."""
        rng = np.random.default_rng(1)
        c = self.config
        side = c.unet_config()["sample_size"]
        x = rng.standard_normal((self.images, side, side, c.latent_channels), np.float32)
        context = (self.images, c.tokens, c.text_width)
        return [x, *(rng.standard_normal(context, np.float32) for _ in range(2))]

    def sampler(self, params: Params, device: str) -> Callable:
        """→ a function that begins to sample: it returns a generator of (x, x0)."""
        c = self.config
        params = to_device(params, device)
        x, null_context, context = (to_device(array, device) for array in self.inputs())
        pipe = unet_pipeline(c.unet_config(), params, c.scheduler_config())
        both = array_module(context).concatenate([null_context, context])
        predict = guided(entered(pipe.predictor(both)), c.guidance)
        return lambda: ddim(predict, pipe.schedule, x, c.steps)

    def ours(self, params: Params, device: str) -> Step:
        """→ latents after the first step."""
        sampler = self.sampler(params, device)
        return lambda: next(sampler())[0]

    def theirs(self, params: Params, layout: str, device: str) -> Step:
        """The same with diffusers."""
        import torch

        from bench import peer

        c = self.config
        model = peer.load(peer.UNet2DConditionModel, c.unet_config(), params, layout, device)
        x, null_context, context = (peer.tensor(a, layout, device) for a in self.inputs())
        both = torch.cat([null_context, context])
        scheduler = peer.DDIMScheduler.from_config(c.scheduler_config())
        scheduler.set_timesteps(c.steps)
        t = scheduler.timesteps[0]

        def step():
            without, with_text = model(torch.cat([x, x]), t, both).sample.chunk(2)
            prediction = without + c.guidance * (with_text - without)
            return scheduler.step(prediction, t, x).prev_sample

        return peer.without_grad(step)


def table(run: Run) -> Rows:
    """A sampling step with guidance

    The demo's U-Net, with and without text as one batch, then one step of DDIM. Of the limit:
    SGEMM.
    """
    for images in (2, 1) if run.tiny else (16, 1):
        yield speed(SamplingStep("tiny" if run.tiny else "demo", images), run)[0]
