"""Latents against pixels: cheaper at the same quality? (Rombach et al. 2022, section 4.1)

The same U-Net is trained on 64×64 shapes at f = 1 (pixels), 2, 4 and 8: for equal time, and for
as many steps as f = 1 makes in it. The cost of the first stage is counted by itself, as in the
paper. Measured are images a second in training and in sampling (decoding included), and the
share of captions whose image is right, by rule. So are the kernel distance from real images in
the features of a classifier, and the PSNR of the first stage.
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyldm.data.shapes import make_shapes
from tinyldm.evaluation.plots import Curves, save_plot
from tinyldm.evaluation.scenes import generate
from tinyldm.evaluation.statistics import kernel_distance, psnr
from tinyldm.experiments.scoring import Report, accuracy
from tinyldm.experiments.trained import new_run, with_steps
from tinyldm.models import Tokenizer
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.classifier import fit_classifier
from tinyldm.training.config import Config
from tinyldm.training.loop import Job, fit
from tinyldm.training.networks import Models
from tinyldm.training.preparation import Say, load_data
from tinyldm.training.signals import Interruptible
from tinyldm.training.stages import Run, begin, second_stage

FACTORS = (1, 2, 4, 8)
WIDTHS = (16, 32, 64, 64)  # of the autoencoder, as many as its levels
BASE = Config(
    preset="latent-vs-pixel", side=64, images=8192 + 256, unet_widths=(48, 64, 96), text_width=64
)
CLASSIFIER_SECONDS = 30.0  # of training, for the classifier
SHOWN = 9  # images of each f
FEWEST, CAPTIONS = 10, 100  # to generate for a measurement, at least and at most
TIMED, LONG_ENOUGH = 8, 3.0  # images of a batch, repeated for so many seconds
COLUMNS = {
    "f": ("f", "d"),
    "steps": ("steps", ",d"),
    "train_images_per_s": ("training, images/s", ".3g"),
    "train_speedup": ("speed-up over f = 1", ".1f"),
    "sample_images_per_s": ("sampling, images/s", ".3g"),
    "sample_speedup": ("speed-up over f = 1", ".1f"),
    "accuracy_all": ("captions right", ".0%"),
    "accuracy_equal_steps": ("right after the steps of f = 1", ".0%"),
    "kernel_distance": ("distance from real images", ".3f"),
    "psnr": ("first stage, dB", ".1f"),
}


def run(seconds: float, out: Path, say: Say, count: int = CAPTIONS) -> list[dict]:
    """Train and score all f; writes results.json, table.md, quality.png and samples.png; → rows."""
    images = load_data(BASE)
    tokenizer = Tokenizer.train(images.captions, BASE.vocabulary, BASE.tokens)
    data = images.split(256 / BASE.images, BASE.seed)
    training, held_out = data
    classifier = fit_classifier(*data, CLASSIFIER_SECONDS, say=say)
    real = classifier.features(held_out.images)
    captions, sheet, quality = [], [], {}
    with Interruptible() as stop:
        report = Report(out, COLUMNS, stop)
        for f in FACTORS:
            kind = "none" if f == 1 else "kl"
            config = replace(BASE, first_stage=kind, vae_widths=WIDTHS[: f.bit_length()])
            config = with_steps(config, seconds, len(training))
            models = Models(config, tokenizer)
            state = begin(models, training, "", "cpu", say)
            one = new_run(out / f"f{f}", state, models, data, say)
            if not captions:  # as many for all as f = 1, the slowest, samples in half the time
                fitting = sampling_speed(one.export()) * seconds / 2
                captions = prompts(int(np.clip(fitting, min(FEWEST, count), count)))
                say(f"quality is measured on {count} captions")
            first_seconds = 0.0
            if f > 1:
                started = time.monotonic()
                one.fit_autoencoder(stop)
                first_seconds = time.monotonic() - started
                one.begin_denoiser()
            generated, quality[f"f = {f}"] = train_unet(one, captions, stop)
            trained_for, right = quality[f"f = {f}"][-1]
            pipeline, steps, some = one.export(), one.state.step, held_out.images[:128]
            decoded = pipeline.decode(pipeline.encode(some))
            row = {
                "f": f,
                "steps": steps,
                "seconds": trained_for,
                "first_stage_seconds": first_seconds,
                "train_images_per_s": steps * config.denoiser.batch / trained_for,
                "sample_images_per_s": sampling_speed(pipeline),
                "accuracy_all": right,
                "accuracy_equal_steps": right,
                "kernel_distance": kernel_distance(classifier.features(generated), real),
                "psnr": float(psnr(decoded, some).mean()) if f > 1 else None,
            }
            slowest = report.rows[0] if report.rows else row
            for key in ("train", "sample"):
                row[f"{key}_speedup"] = row[f"{key}_images_per_s"] / slowest[f"{key}_images_per_s"]
            if f > 1:
                stage = replace(config.denoiser, steps=slowest["steps"])
                models = Models(replace(config, denoiser=stage), tokenizer)
                state = second_stage(models, one.state.first_stage, training, "", "cpu", say)
                other = new_run(out / f"f{f}-equal-steps", state, models, data, say)
                _, by_time = train_unet(other, captions, stop)
                row["accuracy_equal_steps"] = by_time[-1][1]
            report.add(row)
            sheet.append(generated[:SHOWN])
            say(f"f = {f}: {right:.0%} of the captions are right")
    report.save_samples(sheet, list(quality), captions)
    series = {name: tuple(zip(*points, strict=True)) for name, points in quality.items()}
    title = "the same U-Net in pixels (f = 1) and in latents"
    curves = Curves(series, title, "seconds of training", "share of captions right", False)
    save_plot(out / "quality.png", curves)
    return report.rows


def train_unet(
    run: Run, captions: list[str], stop: Interruptible
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Train stage 2 → images generated in the end, [(seconds so far, share of captions right)].

    Before the end, a third of the captions will do. The seconds are those of training alone.
    """
    quality, paused, started, images = [], 0.0, 0.0, None

    def make_job():
        nonlocal started
        job = run.job()
        started = time.monotonic()
        return Job(job.loss_fn, job.batch_at, run.say, report)

    def report():
        nonlocal images, paused
        now = time.monotonic()
        some = captions if run.state.finished else captions[: max(1, len(captions) // 3)]
        images = generate(run.export(), some)
        quality.append((now - started - paused, accuracy(images, some)))
        paused += time.monotonic() - now
        return {}, f", {quality[-1][1]:.0%} of {len(some)} captions right"

    fit(run.folder, run.state, make_job, stop)
    return images, quality


def prompts(count: int) -> list[str]:
    """Return captions to generate, none of whose images were trained on."""
    return make_shapes(count, 16, seed=20_261_125)[1]


def sampling_speed(pipeline: Pipeline) -> float:
    """Measure images a second, from caption to pixels."""
    captions, generated = prompts(TIMED), 0
    pipeline(captions[:2], steps=1)
    started = time.monotonic()
    while generated == 0 or time.monotonic() - started < LONG_ENOUGH:
        generated += len(pipeline(captions))
    return generated / (time.monotonic() - started)
