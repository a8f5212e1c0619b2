"""Training, both stages, in the open.

Stage 1 teaches the autoencoder to pack pictures into latents. Stage 2 encodes the whole data set
once, and teaches the U-Net and the text encoder together to undo noise in latents.
"""

import contextlib
import json
import math
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinyldm.backend import array_module, map_batch, to_device
from tinyldm.data.folder import load_folder
from tinyldm.data.shapes import make_shapes
from tinyldm.files import replacing
from tinyldm.models import Tokenizer
from tinyldm.nn import no_grad
from tinyldm.pipeline import Pipeline, from_uint8
from tinyldm.training import snapshots
from tinyldm.training.optim import learning_rate
from tinyldm.training.signals import Interruptible, Stopped
from tinyldm.training.stages import Models, autoencoder_loss, denoiser_loss, train_step
from tinyldm.training.state import STAGES, State, load_state, save_state, state_files

SAVE_EVERY = 45.0  # seconds between states
LOG_EVERY = 10  # steps between lines of metrics, and between looks at the loss
CALIBRATION = (10, 40)  # steps that are timed to find how many fit into a stage's seconds


class Diverged(RuntimeError):
    """The loss is no longer a number. The last state was saved before that."""


def train(run, config=None, resume=False, device="cpu", say=print):
    """Train a run from nothing, or go on with it; → the finished Pipeline, which is saved in `run`.

    config: a Config, of a new run; a resumed one has its own. say: takes lines of progress.
    Raises Stopped after a signal, Diverged, and FileExistsError rather than overwrite a run.
    """
    run = Path(run)
    if resume:
        state = load_state(run, device)
        config = state.config
    elif state_files(run):
        raise FileExistsError(f"{run}: holds a run already; --resume goes on with it")
    images, captions = load_data(config)
    tokenizer = Tokenizer.train(captions, config.vocabulary, config.tokens)
    models = Models(config, tokenizer)
    if not resume:
        rng = np.random.default_rng((config.seed, 0))
        state = State(config, "autoencoder", to_device(models.vae.init(rng), device))
        save_state(run, state)
        snapshots.data(run, images, captions)
        say(f"{len(images):,} pictures of {config.side}×{config.side}: {run / 'samples/data.png'}")
    with Interruptible() as stop:
        if state.stage == "autoencoder":
            fit_autoencoder(run, state, models, images, stop, say)
            state = begin_denoiser(run, state, models, images, device, say)
        fit_denoiser(run, state, models, images, captions, stop, say)
    pipeline = export(run, state, models)
    snapshots.finished(run, pipeline, captions)
    return pipeline


def load_data(config):
    """→ pictures uint8 (n, side, side, 3), captions."""
    if config.data == "shapes":
        return make_shapes(config.pictures, config.side, config.seed)
    return load_folder(config.data, config.side)


# ----------------------------------------------------------------------------------------- stage 1


def fit_autoencoder(run, state, models, images, stop, say):
    say("stage 1 of 2: the autoencoder learns to pack pictures into latents, and back")
    config, xp = state.config, _library(state)
    side = config.side // models.vae.factor
    latent = (config.autoencoder.batch, side, side, config.latent_channels)

    def batch_at(step):
        rng = np.random.default_rng((config.seed, 1, step))
        chosen = rng.integers(0, len(images), config.autoencoder.batch)
        noise = rng.standard_normal(latent, dtype=np.float32)
        return xp.asarray(from_uint8(images[chosen])), xp.asarray(noise)

    loss_fn = autoencoder_loss(models.vae, config.kl_weight)
    fit(run, state, config.autoencoder, loss_fn, batch_at, stop)


def begin_denoiser(run, state, models, images, device, say):
    """From a finished stage 1 to the start of stage 2: measure the latent scale, make the U-Net."""
    config = state.config
    sample = images[: min(len(images), 2048)]
    mean, std = _gaussians(models.vae, state.average, sample, _library(state))
    z = mean + std * np.random.default_rng((config.seed, 2)).standard_normal(mean.shape)
    scale = float(1 / z.std())
    say(
        f"latent scale 1/std = {scale:.4f}: the latents have a standard deviation of "
        f"{1 / scale:.3f}, and the noise schedule expects 1"
    )
    rng = np.random.default_rng((config.seed, 3))
    params = to_device(models.unet.init(rng) | models.text.init(rng), device)
    new = State(
        config, "denoiser", params, first_stage=state.average,
        done_before=state.step, scaling_factor=scale,
    )  # fmt: skip
    save_state(run, new)
    return new


def _gaussians(vae, params, images, xp):
    """Mean and standard deviation of every picture's latents, (n, h, w, c) each, on the host."""

    def part(x):
        with no_grad():
            return vae.encode(params, xp.asarray(from_uint8(x)))[0]

    moments = to_device(map_batch(part, images, size=128), "cpu")
    mean, logvar = np.split(moments, 2, axis=-1)
    return mean, np.exp(0.5 * np.clip(logvar, -30, 20))


# ----------------------------------------------------------------------------------------- stage 2


def fit_denoiser(run, state, models, images, captions, stop, say):
    config, xp = state.config, _library(state)
    if state.finished:
        return
    say("stage 2 of 2: the U-Net learns to remove noise from latents, guided by the caption")
    mean, std = _gaussians(models.vae, state.first_stage, images, xp)
    ids = models.tokenizer(captions)
    no_caption = models.tokenizer("")
    pictures = snapshots.Progress(run, lambda: export(run, state, models), captions, images)
    pictures.before(mean * state.scaling_factor, models.schedule)

    def batch_at(step):
        rng = np.random.default_rng((config.seed, 4, step))
        size = config.denoiser.batch
        chosen = rng.integers(0, len(images), size)
        normal = rng.standard_normal((2, size, *mean.shape[1:]), dtype=np.float32)
        t = rng.integers(0, len(models.schedule), size)
        dropped = rng.random(size) < config.caption_dropout
        z = (mean[chosen] + std[chosen] * normal[0]) * np.float32(state.scaling_factor)
        tokens = np.where(dropped[:, None], no_caption, ids[chosen])
        return *(xp.asarray(x) for x in (z, normal[1], tokens)), t

    loss_fn = denoiser_loss(models, config.min_snr)
    fit(run, state, config.denoiser, loss_fn, batch_at, stop, pictures)


# ------------------------------------------------------------------------------------- both stages


def fit(run, state, stage, loss_fn, batch_at, stop, pictures=None):
    """Steps of AdamW until the stage is done. The state is saved at least every minute.

    batch_at: `batch_at(step) → the batch of that step`, whatever came before.
    """
    if state.total is None:
        state.total = stage.steps
    saved = time.monotonic()
    step_times = []
    metrics_file = Path(run) / "training" / "metrics.jsonl"
    forget_metrics_after(metrics_file, state)
    bar = tqdm(
        total=state.total, initial=state.step, desc=state.stage, unit="step", disable=None,
        smoothing=0.05, dynamic_ncols=True,
    )  # fmt: skip
    with bar, open(metrics_file, "a", 1, "utf-8") as metrics:
        while state.total is None or state.step < state.total:
            started = time.monotonic()
            rate = learning_rate(state.step, state.total or 10**9, stage.rate, stage.warmup)
            loss, norm = train_step(state, loss_fn, batch_at(state.step), rate, stage.ema)
            state.step += 1
            bar.update()
            if state.step % LOG_EVERY == 0 or state.step == state.total or stop.number:
                line = {"stage": state.stage, "step": state.step, "rate": rate}
                line |= {"loss": _finite(loss, state), "norm": _finite(norm, state)}
                metrics.write(json.dumps(line | {"time": round(time.time(), 2)}) + "\n")
                bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
            step_times.append(time.monotonic() - started)
            if state.total is None and len(step_times) >= CALIBRATION[1]:
                step_seconds = float(np.median(step_times[CALIBRATION[0] :]))
                state.total = max(state.step + 1, int(stage.seconds / step_seconds))
                bar.total = state.total
                bar.refresh()
            if stop.number or time.monotonic() - saved > SAVE_EVERY or state.step == state.total:
                _finite(loss, state), _finite(norm, state)
                save_state(run, state)
                saved = time.monotonic()
            if stop.number:
                if pictures:
                    pictures.export()
                raise Stopped(stop.number)
            if pictures:
                pictures.after_step(state.step, state.total)


def forget_metrics_after(file, state):
    """Drop the lines of steps that will be done again, and one that was cut off."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            before = STAGES.index(entry["stage"]) - STAGES.index(state.stage)
            if before < 0 or (before == 0 and entry["step"] <= state.step):
                kept.append(line + "\n")
    with replacing(file) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def export(run, state, models):
    """Write the component folders from the averaged weights of stage 2."""
    config = state.config
    configs = {
        "unet": config.unet_config(),
        "vae": config.vae_config() | {"scaling_factor": state.scaling_factor},
        "text_encoder": config.text_config(models.tokenizer),
        "scheduler": config.scheduler_config(),
    }
    average = state.average
    params = {
        "unet": {name: average[name] for name in models.unet.shapes()},
        "vae": state.first_stage,
        "text_encoder": {name: average[name] for name in models.text.shapes()},
    }
    defaults = {"steps": config.steps, "guidance": config.guidance, "sampler": "ddim"}
    pipeline = Pipeline(configs, params, models.tokenizer, defaults)
    pipeline.save(run)
    return pipeline


def rebuild(run):
    """Export again from the newest state, after an export that was cut off."""
    state = load_state(run)
    if state.stage != "denoiser":
        raise FileNotFoundError(
            f"{run}: has no model yet, only stage 1 has begun; --resume goes on with it"
        )
    _, captions = load_data(state.config)
    tokenizer = Tokenizer.train(captions, state.config.vocabulary, state.config.tokens)
    return export(run, state, Models(state.config, tokenizer))


def _finite(number, state):
    number = float(number)
    if not math.isfinite(number):
        raise Diverged(
            f"stage {state.stage}, step {state.step}: loss or gradient is {number}. The last "
            "saved state is intact; start again with a lower learning rate"
        )
    return number


def _library(state):
    return array_module(next(iter(state.params.values())))
