"""A short run whose folder diffusers loads, for the tests of whole pipelines against it."""

import numpy as np

from tinyldm.training.config import Config, Stage
from tinyldm.training.run import train

STAGE = Stage(batch=4, rate=1e-3, warmup=2, ema=0.9, steps=3)
CONFIG = Config(
    side=16,
    images=64,
    autoencoder=STAGE,
    denoiser=STAGE,
    vae_widths=(4, 8),
    unet_widths=(8, 16),
    unet_attention=(False, True),
    groups=4,
    heads=2,
    text_width=8,
    text_layers=2,
    steps=2,
)
PROMPTS = ["a large red circle on blue at the left", "a small white triangle on black at the top"]
STEPS = 8


def trained_and_moved(run, config):
    """A short run, all of its weights then moved: none is zero, nor one."""
    pipeline = train(run, config, say=lambda line: None)
    rng = np.random.default_rng(0)
    for params in pipeline.params.values():
        for name, w in params.items():
            spread = 0.3 * (w.size / w.shape[-1]) ** -0.5 if w.ndim > 1 else 0.2
            params[name] = w + rng.normal(0, spread, w.shape).astype(np.float32)
    pipeline.save(run)
    return run
