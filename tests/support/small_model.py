"""A small random model that generates, for the tests of all that goes around it."""

import numpy as np
from model_cases import random_params

from tinyldm.checkpoints.components import COMPONENTS
from tinyldm.models import Tokenizer
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.config import Config

CONFIG = Config(
    side=16,
    vae_widths=(4, 8),
    unet_widths=(8, 12),
    unet_attention=(False, True),
    heads=2,
    groups=4,
    text_width=8,
    text_layers=1,
)
PROMPTS = ["a red circle", "a blue square", "two red squares", "a small blue circle", ""]
STEPS = 3


def make_pipeline(in_channels=4):
    """Every weight is random, also those that a new model starts with as zeros."""
    tokenizer = Tokenizer.train(PROMPTS * 2, vocab_size=600, max_length=CONFIG.tokens)
    configs = {
        "unet": CONFIG.unet_config() | {"in_channels": in_channels},
        "vae": CONFIG.vae_config() | {"scaling_factor": 0.8},
        "text_encoder": CONFIG.text_config(tokenizer),
        "scheduler": CONFIG.scheduler_config(),
    }
    params = {
        name: {
            weight: x.astype(np.float32)
            for weight, x in random_params(model(configs[name]).shapes(), name).items()
        }
        for name, (_, model, _) in COMPONENTS.items()
    }
    assert all(w.all() for named in params.values() for w in named.values())
    return Pipeline(configs, params, tokenizer, {"steps": STEPS, "guidance": 2.0})


def start_noise(n, seed=0, shape=(8, 8, 4)):
    """The rule: image i of a seed starts from the noise of (seed, i), whatever else there is."""
    streams = (np.random.default_rng((seed, i)) for i in range(n))
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


def generate(pipe, *args, **options):
    return np.stack([np.asarray(image) for image in pipe(*args, **options)])
