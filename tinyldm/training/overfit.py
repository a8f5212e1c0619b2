"""Overfitting self-test: trained on one batch again and again, the loss must fall to nearly 0.

Images, noise and time steps stay the same, so that the batch can be memorised. Where that
fails, the networks, their gradients or the learning rates are wrong, and not the data.
"""

from dataclasses import replace

import numpy as np

from tinyldm.config import ConfigError
from tinyldm.nn.optim import learning_rate
from tinyldm.training.config import STAGES, Config
from tinyldm.training.networks import Models
from tinyldm.training.preparation import Say, fit_tokenizer, load_data
from tinyldm.training.stages import Run, begin
from tinyldm.training.step import gradient, train_step

STEPS, BATCH = 300, 8
ENOUGH = 0.2  # of the first loss


def overfit(config: Config, device: str, say: Say) -> dict[str, tuple[float, float]]:
    """Train 300 steps on the same eight images → {stage: (first loss, last loss)}.

    Raises ConfigError with a discriminator.
    """
    if config.adversarial:
        raise ConfigError(
            "adversarial: two networks contend, and no loss need fall; leave it out for --overfit"
        )
    shorter = {name: replace(getattr(config, name), batch=BATCH, ema=0.9) for name in STAGES}
    config = replace(config, images=BATCH, held_out=0.0, caption_dropout=0.0, **shorter)
    data = load_data(config)
    tokenizer, config = fit_tokenizer(config, data.captions, say)
    data = data.pick(np.linspace(0, len(data) - 1, min(BATCH, len(data))).astype(int))
    models = Models(config, tokenizer)
    state = begin(models, data, "", device, say)
    run, losses = Run("", state, models, data, data, device, say), {}
    for name in models.stages:
        if name != run.state.stage:
            run.begin_denoiser()
        losses[name] = _learn(run.state, run.job())
    return losses


def _learn(state, job):
    stage, batch = getattr(state.config, state.stage), job.batch_at(0)
    seen = []
    with gradient(job.loss_fn, state.params) as gradient_of:
        for step in range(STEPS):
            rate = learning_rate(step, STEPS, stage.rate, min(stage.warmup, STEPS // 10))
            loss, _ = train_step(state, gradient_of, batch, rate, stage.ema)
            state.step += 1
            if step in (0, STEPS - 1):
                seen.append(float(loss))
    return tuple(seen)


def report(losses: dict[str, tuple[float, float]], say: Say) -> bool:
    """Print the losses of `overfit`; → whether both stages learnt."""
    learnt = {name: last < ENOUGH * first for name, (first, last) in losses.items()}
    for name, (first, last) in losses.items():
        verdict = "it learns" if learnt[name] else "IT DOES NOT LEARN"
        say(f"{name}: loss {first:.4f} → {last:.4f} in {STEPS} steps on one batch: {verdict}")
    return all(learnt.values())
