"""A run: both stages of training, in the open.

Stage 1 teaches the autoencoder to pack pictures into latents. Stage 2 encodes the whole data set
once, and teaches the U-Net and the text encoder together to undo noise in latents.
"""

import warnings
from pathlib import Path

import numpy as np

from tinyldm.backend import array_module, map_batch, to_device
from tinyldm.config import ConfigError
from tinyldm.data.dataset import DataError, Dataset
from tinyldm.models import Tokenizer
from tinyldm.nn import no_grad
from tinyldm.pipeline import Pipeline, from_uint8
from tinyldm.training import snapshots
from tinyldm.training.loop import fit
from tinyldm.training.preparation import (
    Say,
    describe,
    fit_tokenizer,
    load_data,
    refuse_folder,
    remove,
)
from tinyldm.training.presets import STAGES, Config, changed, with_length
from tinyldm.training.rehearsal import ENCODED_AT_ONCE, rehearse
from tinyldm.training.signals import Interruptible, Stopped
from tinyldm.training.stages import Models, autoencoder_loss, denoiser_loss
from tinyldm.training.state import State, load_state, save_state


def train(
    run: str | Path,
    config: Config,
    device: str = "cpu",
    overwrite: bool = False,
    say: Say = print,
) -> Pipeline:
    """Train a new run from nothing; → the finished Pipeline, which is saved in `run`.

    overwrite: replace the run that is there. say: takes lines of progress.
    Raises Stopped after a signal, Diverged, DataError, and FileExistsError rather than overwrite.
    """
    run = Path(run)
    refuse_folder(run, config, overwrite)
    data = load_data(config)
    training, held_out = data.split(config.held_out, config.seed)
    describe(training, held_out, say)
    tokenizer, config = fit_tokenizer(config, training.captions, say)
    rehearsal = rehearse(config, len(training), device)
    rehearsal.announce(say)
    if rehearsal.hopeless:
        raise ConfigError(f"{run}: not begun, for want of memory")
    models = Models(config, tokenizer)
    rng = np.random.default_rng((config.seed, 0))
    params = to_device(models.vae.init(rng), device)
    state = State(config, STAGES[0], params, tokenizer, data.fingerprint())
    if overwrite:
        remove(run)
    save_state(run, state)
    if data.skipped:
        report = run / "training" / "skipped.txt"
        report.write_text("".join(f"{line}\n" for line in data.skipped), encoding="utf-8")
    snapshots.data(run, training)
    say(f"what is to be learnt: {run / 'samples' / 'data.png'}")
    return _finish(run, state, models, training, held_out, device, say)


def resume(
    run: str | Path,
    device: str = "cpu",
    minutes: float | None = None,
    say: Say = print,
    **settings: object,
) -> Pipeline:
    """Go on with a run as if it had never stopped; → the finished Pipeline.

    minutes: train this long from now on, instead of what was left. settings: others that may change
    (see `presets.changed`). DataError if the pictures or captions are no longer the same.
    """
    run = Path(run)
    state = load_state(run, device)
    state.config = changed(state.config, **settings)
    if minutes is not None:
        left = STAGES[STAGES.index(state.stage) :]
        state.config, state.total = with_length(state.config, 60 * minutes, left), None
    data = load_data(state.config)
    if data.fingerprint() != state.data:
        raise DataError(
            f"{state.config.data}: the {len(data):,} pictures and captions are no longer those "
            f"that {run} was begun with; bring them back, or begin a new run"
        )
    models = Models(state.config, state.tokenizer)
    training, held_out = data.split(state.config.held_out, state.config.seed)
    say(f"going on with {state.stage}, step {state.step}")
    return _finish(run, state, models, training, held_out, device, say)


def _finish(run, state, models, training, held_out, device, say):
    with Interruptible() as stop:
        if state.stage == "autoencoder":
            fit_autoencoder(run, state, models, training, held_out, stop, say)
            state = begin_denoiser(run, state, models, training, device, say)
        fit_denoiser(run, state, models, training, held_out, stop, say)
    pipeline = export(run, state, models)
    snapshots.finished(run, pipeline, training.captions)
    return pipeline


# ----------------------------------------------------------------------------------------- stage 1


def fit_autoencoder(
    run: Path,
    state: State,
    models: Models,
    training: Dataset,
    held_out: Dataset,
    stop: Interruptible,
    say: Say,
) -> None:
    """Stage 1. `state` moves on; pictures (n, side, side, 3) become reconstructions of the same."""
    say("stage 1 of 2: the autoencoder learns to pack pictures into latents, and back")
    config, xp = state.config, _library(state)
    images = training.images
    side = config.side // models.vae.factor
    latent = (config.autoencoder.batch, side, side, config.latent_channels)

    def batch_at(step):
        rng = np.random.default_rng((config.seed, 1, step))
        chosen = rng.integers(0, len(images), config.autoencoder.batch)
        noise = rng.standard_normal(latent, dtype=np.float32)
        return xp.asarray(from_uint8(images[chosen])), xp.asarray(noise)

    def report():
        return snapshots.autoencoder(models.vae, state.average, held_out)

    loss_fn = autoencoder_loss(models.vae, config.kl_weight)
    fit(run, state, config.autoencoder, loss_fn, batch_at, stop, report, say)


def begin_denoiser(
    run: Path, state: State, models: Models, training: Dataset, device: str, say: Say
) -> State:
    """From a finished stage 1 to the start of stage 2: measure the latent scale, make the U-Net."""
    config = state.config
    sample = training.images[:2048]
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
        config, "denoiser", params, state.tokenizer, state.data, first_stage=state.average,
        done_before=state.step, scaling_factor=scale,
    )  # fmt: skip
    save_state(run, new)
    return new


def _gaussians(vae, params, images, xp):
    """Mean and standard deviation of every picture's latents, (n, h, w, c) each, on the host."""

    def part(x):
        with no_grad():
            return vae.encode(params, xp.asarray(from_uint8(x)))[0]

    moments = to_device(map_batch(part, images, size=ENCODED_AT_ONCE), "cpu")
    mean, logvar = np.split(moments, 2, axis=-1)
    return mean, np.exp(0.5 * np.clip(logvar, -30, 20))


# ----------------------------------------------------------------------------------------- stage 2


def fit_denoiser(
    run: Path,
    state: State,
    models: Models,
    training: Dataset,
    held_out: Dataset,
    stop: Interruptible,
    say: Say,
) -> None:
    """Stage 2. `state` moves on; every picture becomes latents (h, w, c) once, at the start."""
    config, xp = state.config, _library(state)
    if state.finished:
        return
    say(
        "stage 2 of 2: the U-Net learns to remove noise from latents, guided by the caption; its "
        "loss goes flat early, and that is normal: most of it is noise that nobody could predict. "
        "Look at samples/, and at the loss at high noise"
    )
    n = len(training)
    mean, std = _gaussians(models.vae, state.first_stage, training.images, xp)
    ids = tokens_of(models.tokenizer, training.captions)
    no_caption = models.tokenizer("")
    snapshots.first_stage(run, export(run, state, models), training, mean[0] * state.scaling_factor)

    def batch_at(step):
        rng = np.random.default_rng((config.seed, 4, step))
        size = config.denoiser.batch
        chosen = rng.integers(0, n, size)
        normal = rng.standard_normal((2, size, *mean.shape[1:]), dtype=np.float32)
        t = rng.integers(0, len(models.schedule), size)
        dropped = rng.random(size) < config.caption_dropout
        z = (mean[chosen] + std[chosen] * normal[0]) * np.float32(state.scaling_factor)
        tokens = np.where(dropped[:, None], no_caption, ids[chosen])
        return *(xp.asarray(x) for x in (z, normal[1], tokens)), t

    def report():
        pipeline = export(run, state, models)
        return snapshots.denoiser(run, pipeline, training.captions, held_out, state.step)

    loss_fn = denoiser_loss(models, config.min_snr)
    try:
        fit(run, state, config.denoiser, loss_fn, batch_at, stop, report, say)
    except Stopped:
        export(run, state, models)
        raise


def tokens_of(tokenizer: Tokenizer, captions: list[str]) -> np.ndarray:
    """Ids (n, l) of captions, cut without a word: that was said when the run began."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer(captions)


def export(run: Path, state: State, models: Models) -> Pipeline:
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


def rebuild(run: str | Path) -> Pipeline:
    """Export again from the newest state, after an export that was cut off."""
    state = load_state(run)
    if state.stage != "denoiser":
        raise FileNotFoundError(
            f"{run}: has no model yet, only stage 1 has begun; tinyldm train --out {run} --resume "
            "goes on with it"
        )
    return export(run, state, Models(state.config, state.tokenizer))


def _library(state):
    return array_module(next(iter(state.params.values())))
