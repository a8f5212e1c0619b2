"""The two stages of training, in the open.

Stage 1 trains the autoencoder to compress images into latents. Stage 2 encodes the whole data set
once, and trains the U-Net and the text encoder together to remove noise from latents.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyldm.backend import array_module, to_device
from tinyldm.data.dataset import Dataset
from tinyldm.data.tokenizer import CaptionCut
from tinyldm.nn.protocol import Params
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.sampling.tasks import takes_whole_image
from tinyldm.training import codebook, snapshots
from tinyldm.training.config import STAGES
from tinyldm.training.latents import all_gaussians, conditioner, conditioning_arrays
from tinyldm.training.loop import Job, fit
from tinyldm.training.networks import Models, denoiser_loss, new_discriminator
from tinyldm.training.preparation import Say
from tinyldm.training.signals import Interruptible, Stopped
from tinyldm.training.state import State, save_state


def begin(models: Models, training: Dataset, fingerprint: str, device: str, say: Say) -> State:
    """Return the state in which a run begins: stage 1, or 2 where the first has no weights."""
    config = models.config
    params = to_device(models.vae.init(np.random.default_rng((config.seed, 0))), device)
    if not params:
        return second_stage(models, params, training, fingerprint, device, say)
    discriminator = to_device(new_discriminator(models), device)
    return State(
        config, STAGES[0], params, models.tokenizer, fingerprint, discriminator=discriminator
    )


def second_stage(
    models: Models, first_stage: Params, training: Dataset, fingerprint: str, device: str, say: Say
) -> State:
    """Return the state in which stage 2 begins: latent scale measured, fresh U-Net."""
    config = models.config
    z, std = all_gaussians(models, first_stage, training.images[:2048], device)
    if std is not None:
        z = z + std * np.random.default_rng((config.seed, 2)).standard_normal(z.shape)
    scale = float(1 / z.std()) if z.std() > 0 else 1.0  # where all images are of one colour
    say(
        f"latent scale 1/std = {scale:.4f}: the latents have a standard deviation of "
        f"{1 / scale:.3f}, and the noise schedule expects 1"
    )
    params = to_device(models.init_denoiser(np.random.default_rng((config.seed, 3))), device)
    return State(
        config, STAGES[1], params, models.tokenizer, fingerprint, first_stage=first_stage,
        scaling_factor=scale,
    )  # fmt: skip


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
                if self.state.stage == STAGES[0]:
                    self.fit_autoencoder(stop)
                    self.begin_denoiser()
                    save_state(self.folder, self.state)
                if not self.state.finished:
                    self.fit_denoiser(stop)
            pipeline = self.export()
            snapshots.finished(self.folder, pipeline, self.training, self.held_out)
        return pipeline

    def job(self) -> Job:
        """Return the present stage's loss and batches, and what is done besides its steps."""
        return self.autoencoder_job() if self.state.stage == STAGES[0] else self.denoiser_job()

    # ------------------------------------------------------------------------------------- stage 1

    def fit_autoencoder(self, stop: Interruptible) -> None:
        """Train stage 1: images (n, height, width, c) to reconstructions of the same."""
        self.say("stage 1 of 2: the autoencoder learns to compress images into latents, and back")
        fit(self.folder, self.state, self.autoencoder_job, stop)

    def autoencoder_job(self) -> Job:
        """Make stage 1's job. A batch: images, and noise for a KL autoencoder's latents."""
        state, models, config = self.state, self.models, self.state.config

        def pixels(rng, count):
            images = self.training.images
            return self.xp.asarray(models.pixels(images[rng.integers(0, len(images), count)]))

        def batch_at(step):
            rng = np.random.default_rng((config.seed, 1, step))
            x = pixels(rng, config.autoencoder.batch)
            if not models.vae.draws_noise:
                return (x,)
            noise = rng.standard_normal((len(x), *config.latent_shape), np.float32)
            return x, self.xp.asarray(noise)

        def after_step():
            if config.first_stage == "vq" and codebook.due(state):
                rng = np.random.default_rng((config.seed, 6, state.step))
                some = pixels(rng, codebook.IMAGES)
                codebook.reinitialise_dead_codes(models.vae, state, some, rng)

        def report():
            return snapshots.autoencoder(models.vae, state.average, self.held_out)

        return Job(models.first_stage_loss(), batch_at, self.say, report, after_step)

    def begin_denoiser(self) -> None:
        """Go from the end of stage 1 to the start of stage 2."""
        before, data = self.state, self.training
        self.state = second_stage(
            self.models, before.average, data, before.data, self.device, self.say
        )
        self.state.done_before = before.step

    # ------------------------------------------------------------------------------------- stage 2

    def fit_denoiser(self, stop: Interruptible) -> None:
        """Train stage 2: encode all images to latents (h, w, c) once, and learn to denoise them."""
        self.say(
            "stage 2 of 2: the U-Net learns to remove noise from latents, given its condition; "
            "its loss goes flat early, and that is normal: most of it is noise that no network "
            "could predict. Look at samples/, and at the loss at high noise"
        )
        snapshots.first_stage(self.folder, self.export(), self.training)
        try:
            fit(self.folder, self.state, self.denoiser_job, stop)
        except Stopped:
            self.export()
            raise

    def denoiser_job(self) -> Job:
        """Make stage 2's job. A batch: latents, noise, token ids, time steps, and conditioning.

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
            batch = (self.xp.asarray(x) for x in (z * scale, normal[1], tokens, t))
            return *batch, *arrays_of(chosen, rng)

        def report():
            data = self.training, self.held_out
            return snapshots.denoiser(self.folder, self.export(), *data, state.step)

        return Job(denoiser_loss(models, conditioner(state, models)), batch_at, self.say, report)

    def export(self) -> Pipeline:
        """Export the model as it is now."""
        return export(self.folder, self.state, self.models)


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
