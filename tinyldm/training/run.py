"""A run: both stages of training, in the open.

Stage 1 trains the autoencoder to compress images into latents. Stage 2 encodes the whole data set
once, and trains the U-Net and the text encoder together to remove noise from latents.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyldm.backend import Array, array_module, to_device
from tinyldm.config import ConfigError
from tinyldm.data.dataset import DataError, Dataset
from tinyldm.data.tokenizer import CaptionCut
from tinyldm.nn.protocol import Params
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.sampling.tasks import takes_whole_image
from tinyldm.training import codebook, snapshots
from tinyldm.training.config import STAGES, Config
from tinyldm.training.estimate import estimate_run
from tinyldm.training.latents import all_gaussians, conditioner, conditioning_arrays
from tinyldm.training.loop import Job, fit
from tinyldm.training.losses import Features
from tinyldm.training.networks import Models, denoiser_loss, new_discriminator
from tinyldm.training.preparation import (
    Say,
    describe_data,
    fit_tokenizer,
    load_data,
    refuse_folder,
    remove,
    split,
)
from tinyldm.training.presets import changed, with_length
from tinyldm.training.signals import Interruptible, Stopped
from tinyldm.training.state import State, load_notes, load_state, save_state, state_files


def train(
    run: str | Path,
    config: Config,
    device: str = "cpu",
    overwrite: bool = False,
    say: Say = print,
    features: Features | None = None,
) -> Pipeline:
    """Train a new run from nothing; → the finished Pipeline, which is saved in `run`.

    overwrite: replace the run that is there. say: takes lines of progress. features: the network of
    the perceptual loss, on the same device, where `config.perceptual` gives that a weight.
    Raises Stopped after a signal, Diverged, DataError, and FileExistsError rather than overwrite.
    """
    run = Path(run)
    refuse_folder(run, config, overwrite)
    data = load_data(config)
    training, held_out = split(data, config)
    describe_data(training, held_out, say)
    tokenizer, config = fit_tokenizer(config, data.captions, say)
    estimate = estimate_run(config, len(training), device, features)
    estimate.announce(say)
    if estimate.cannot_fit:
        raise ConfigError(f"{run}: not started: there is not enough memory")
    models = Models(config, tokenizer, features)
    params = to_device(models.vae.init(np.random.default_rng((config.seed, 0))), device)
    fingerprint = data.fingerprint()
    if params:
        discriminator = to_device(new_discriminator(models), device)
        state = State(
            config, STAGES[0], params, tokenizer, fingerprint, discriminator=discriminator
        )
    else:  # the first stage has no parameters
        state = second_stage(config, models, params, training, fingerprint, 0, device, say)
    if overwrite:
        remove(run)
    save_state(run, state)
    if data.skipped:
        report = run / "training" / "skipped.txt"
        report.write_text("".join(f"{line}\n" for line in data.skipped), encoding="utf-8")
    snapshots.data(run, training)
    say(f"training images: {run / 'samples' / 'data.png'}")
    return Run(run, state, models, training, held_out, device, say).finish()


def resume(
    run: str | Path,
    device: str = "cpu",
    minutes: float | None = None,
    say: Say = print,
    features: Features | None = None,
    **settings: object,
) -> Pipeline:
    """Resume a run as if it had never stopped; → the finished Pipeline.

    minutes: train this long from now on, instead of what was left. settings: others that may change
    (see `presets.changed`). features: the network that the run began with, if it had one.
    DataError if the images or captions are no longer the same.
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
            f"{state.config.data}: the {len(data):,} images and captions are no longer those "
            f"that {run} was begun with; bring them back, or begin a new run"
        )
    models = Models(state.config, state.tokenizer, features)
    training, held_out = split(data, state.config)
    say(f"resuming {state.stage}, step {state.step}")
    return Run(run, state, models, training, held_out, device, say).finish()


@dataclass
class Run:
    """A run in progress: its folder, its state, its networks and its data."""

    folder: Path
    state: State
    models: Models
    training: Dataset
    held_out: Dataset
    device: str
    say: Say

    def __post_init__(self):
        self.xp = array_module(next(iter(self.state.params.values())))

    def finish(self) -> Pipeline:
        """Train to the end of both stages, or until a signal (Stopped)."""
        # Captions that are cut were reported when the run began.
        with warnings.catch_warnings(action="ignore", category=CaptionCut):
            with Interruptible() as stop:
                if self.state.stage == "autoencoder":
                    self.fit_autoencoder(stop)
                    self.begin_denoiser()
                if not self.state.finished:
                    self.fit_denoiser(stop)
            pipeline = self.export()
            snapshots.finished(self.folder, pipeline, self.training, self.held_out)
        return pipeline

    def export(self) -> Pipeline:
        """Export the model as it is now."""
        return export(self.folder, self.state, self.models)

    # ------------------------------------------------------------------------------------- stage 1

    def fit_autoencoder(self, stop: Interruptible) -> None:
        """Train stage 1: images (n, side, side, 3) to reconstructions of the same."""
        self.say("stage 1 of 2: the autoencoder learns to compress images into latents, and back")
        config, models = self.state.config, self.models
        batch_at = self.image_batches()

        def report():
            return snapshots.autoencoder(models.vae, self.state.average, self.held_out)

        def after_step():
            if config.first_stage == "vq" and codebook.due(self.state):
                rng = np.random.default_rng((config.seed, 6, self.state.step))
                codebook.reinitialise_dead_codes(
                    models.vae, self.state, self.pixels(rng, codebook.IMAGES), rng
                )

        job = Job(models.first_stage_loss(), batch_at, self.say, report, after_step)
        fit(self.folder, self.state, job, stop)

    def pixels(self, rng: np.random.Generator, count: int) -> Array:
        """Draw training images, (count, height, width, channels) in −1…1."""
        images = self.training.images
        return self.xp.asarray(self.models.pixels(images[rng.integers(0, len(images), count)]))

    def image_batches(self) -> Callable[[int], tuple]:
        """Return stage 1's `batch_at(step)`: images, and noise for a KL autoencoder's latents."""
        config = self.state.config

        def batch_at(step):
            rng = np.random.default_rng((config.seed, 1, step))
            x = self.pixels(rng, config.autoencoder.batch)
            if not self.models.vae.draws_noise:
                return (x,)
            noise = rng.standard_normal((len(x), *config.latent_shape), np.float32)
            return x, self.xp.asarray(noise)

        return batch_at

    def begin_denoiser(self) -> None:
        """Go from the end of stage 1 to the start of stage 2."""
        before = self.state
        self.state = second_stage(
            before.config, self.models, before.average, self.training, before.data, before.step,
            self.device, self.say,
        )  # fmt: skip
        save_state(self.folder, self.state)

    # ------------------------------------------------------------------------------------- stage 2

    def fit_denoiser(self, stop: Interruptible) -> None:
        """Train stage 2: encode all images to latents (h, w, c) once, and learn to denoise them."""
        self.say(
            "stage 2 of 2: the U-Net learns to remove noise from latents, given its condition; "
            "its loss goes flat early, and that is normal: most of it is noise that no network "
            "could predict. Look at samples/, and at the loss at high noise"
        )
        state = self.state
        batch_at, first = self.latent_batches()
        snapshots.first_stage(self.folder, self.export(), self.training, first)

        def report():
            return snapshots.denoiser(
                self.folder, self.export(), self.training, self.held_out, state.step
            )

        loss_fn = denoiser_loss(self.models, conditioner(state, self.models))
        try:
            fit(self.folder, state, Job(loss_fn, batch_at, self.say, report), stop)
        except Stopped:
            self.export()
            raise

    def latent_batches(self) -> tuple[Callable[[int], tuple], np.ndarray]:
        """Return stage 2's `batch_at(step)`, and the first image's latents (h, w, c).

        Every image is encoded here, once; its latents are drawn anew in every batch.
        """
        state, models = self.state, self.models
        config, n = state.config, len(self.training)
        mean, std = all_gaussians(models, state.first_stage, self.training.images, self.device)
        scale = np.float32(state.scaling_factor)
        ids, no_caption = models.tokenizer(self.training.captions), models.tokenizer("")
        arrays_of = conditioning_arrays(state, models, self.training, self.device)

        def batch_at(step):
            rng = np.random.default_rng((config.seed, 4, step))
            size = config.denoiser.batch
            chosen = rng.integers(0, n, size)
            normal = rng.standard_normal((2, size, *mean.shape[1:]), dtype=np.float32)
            if config.noise_offset:
                channels = (size, 1, 1, mean.shape[-1])
                normal[1] += config.noise_offset * rng.standard_normal(channels, np.float32)
            t = rng.integers(0, len(models.schedule), size)
            dropped = rng.random(size) < config.caption_dropout
            z = mean[chosen]
            if std is not None:
                z = z + std[chosen] * normal[0]
            dropped = dropped.reshape(-1, *[1] * (ids.ndim - 1))
            tokens = np.where(dropped, no_caption, ids[chosen])
            batch = (self.xp.asarray(x) for x in (z * scale, normal[1], tokens))
            return *batch, t, *arrays_of(chosen, rng)

        return batch_at, mean[0] * scale


def second_stage(
    config: Config,
    models: Models,
    first_stage: Params,
    training: Dataset,
    fingerprint: str,
    done_before: int,
    device: str,
    say: Say,
) -> State:
    """Return the state in which stage 2 begins: latent scale measured, fresh U-Net."""
    z, std = all_gaussians(models, first_stage, training.images[:2048], device)
    if std is not None:
        z = z + std * np.random.default_rng((config.seed, 2)).standard_normal(z.shape)
    scale = float(1 / z.std())
    say(
        f"latent scale 1/std = {scale:.4f}: the latents have a standard deviation of "
        f"{1 / scale:.3f}, and the noise schedule expects 1"
    )
    rng = np.random.default_rng((config.seed, 3))
    params = to_device(models.init_denoiser(rng), device)
    return State(
        config, "denoiser", params, models.tokenizer, fingerprint, first_stage=first_stage,
        done_before=done_before, scaling_factor=scale,
    )  # fmt: skip


def export(run: Path, state: State, models: Models) -> Pipeline:
    """Write the component folders from the averaged weights of stage 2."""
    config = state.config
    configs = config.configs(models.tokenizer)
    configs["vae"] |= {"scaling_factor": state.scaling_factor}
    average = state.average
    params = {
        "unet": {name: average[name] for name in models.unet.shapes()},
        "vae": state.first_stage,
    }
    if models.text:
        params["text_encoder"] = {name: average[name] for name in models.text.shapes()}
    defaults = {"steps": config.steps, "guidance": config.guidance, "sampler": "ddim"}
    if takes_whole_image(config.task):  # which the number of channels leaves open
        defaults["task"] = config.task
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


def whole_run(run: str, say: Say) -> str:
    """Return `run`, its component folders exported again if the last export was cut off."""
    folder = Path(run)
    if folder.is_dir() and not (folder / "model_index.json").exists() and state_files(run):
        if load_notes(run)["stage"] == "denoiser":
            say(f"{run}: the export is incomplete; exporting again from the state")
        rebuild(run)
    return run
