"""Latents against pixels: cheaper at the same quality? (Rombach et al. 2022, section 4.1)

The demo's U-Net is trained at f = 1 (pixels), 2 and 4, each for as many steps, by the same recipe.
So are the first stages of f = 2 and 4; what they cost is counted by itself, as in the paper.
Measured are the seconds of training, images a second in sampling (decoding included), the share of
captions whose image is right, by rule, and the median distance of images from true drawings.
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyldm.data.shapes import make_shapes
from tinyldm.evaluation.metrics import from_drawings
from tinyldm.evaluation.plots import Curves, save_plot
from tinyldm.evaluation.scenes import generate
from tinyldm.evaluation.statistics import psnr
from tinyldm.experiments.scoring import Report, accuracy
from tinyldm.experiments.trained import new_run, with_steps
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.loop import Job, fit
from tinyldm.training.networks import Models
from tinyldm.training.preparation import Say, fit_tokenizer, load_data, split
from tinyldm.training.presets import PRESETS
from tinyldm.training.signals import Interruptible
from tinyldm.training.stages import Run, begin

FACTORS = (1, 2, 4)
WIDTHS = (32, 32, 32)  # of the autoencoder, as many as its levels
BASE = replace(PRESETS["demo"], preset="latent-vs-pixel")
SHOWN = 9  # images of each f
CAPTIONS = 100  # to generate for a measurement
TIMED, LONG_ENOUGH = 8, 3.0  # images of a batch, repeated for so many seconds
COLUMNS = {
    "f": ("f", "d"),
    "steps": ("steps", ",d"),
    "first_stage_seconds": ("first stage, s", ".0f"),
    "seconds": ("U-Net, s", ".0f"),
    "train_speedup": ("speed-up over f = 1", ".1f"),
    "sample_images_per_s": ("sampling, images/s", ".3g"),
    "sample_speedup": ("speed-up over f = 1", ".1f"),
    "accuracy_all": ("captions right", ".0%"),
    "drawing": ("from true drawings, levels of 255", ".1f"),
    "psnr": ("first stage, dB", ".1f"),
}


def run(seconds: float, out: Path, say: Say, count: int = CAPTIONS) -> list[dict]:
    """Train and score all f; writes results.json, table.md, quality.png and samples.png; → rows.

    seconds: of training in pixels. All f, and the first stages, take as many steps as fit in them.
    """
    images = load_data(BASE)
    data = split(images, BASE)
    tokenizer, base = fit_tokenizer(BASE, images.captions, say)
    pixels = replace(base, first_stage="none", vae_widths=WIDTHS[:1])
    steps = with_steps(pixels, seconds, len(data[0])).denoiser.steps
    stages = {
        name: replace(getattr(base, name), steps=steps, seconds=None)
        for name in ("autoencoder", "denoiser")
    }
    captions = make_shapes(count, base.side, seed=20_261_125)[1]
    sheet, quality = [], {}
    with Interruptible() as stop:
        report = Report(out, COLUMNS, stop)
        for f in FACTORS:
            kind = "none" if f == 1 else base.first_stage
            config = replace(base, first_stage=kind, vae_widths=WIDTHS[: f.bit_length()], **stages)
            models = Models(config, tokenizer)
            state = begin(models, data[0], "", "cpu", say)
            one = new_run(out / f"f{f}", state, models, data, say)
            first_seconds = None
            if f > 1:
                started = time.monotonic()
                one.fit_autoencoder(stop)
                first_seconds = time.monotonic() - started
                one.begin_denoiser()
            generated, quality[f"f = {f}"] = train_unet(one, captions, stop)
            pipeline, some = one.export(), data[1].images[:128]
            row = {
                "f": f,
                "steps": steps,
                "first_stage_seconds": first_seconds,
                "seconds": quality[f"f = {f}"][-1][0],
                "sample_images_per_s": sampling_speed(pipeline, captions[:TIMED]),
                "accuracy_all": accuracy(generated, captions),
                "drawing": float(from_drawings(generated, captions)[0]),
                "psnr": None,
            }
            if f > 1:
                decoded = pipeline.decode(pipeline.encode(some))
                row["psnr"] = float(psnr(decoded, some).mean())
            slowest = report.rows[0] if report.rows else row
            faster = row["sample_images_per_s"] / slowest["sample_images_per_s"]
            row |= {"train_speedup": slowest["seconds"] / row["seconds"], "sample_speedup": faster}
            report.add(row)
            sheet.append(generated[:SHOWN])
            say(f"f = {f}: {row['accuracy_all']:.0%} of the captions are right")
    report.save_samples(sheet, list(quality), captions)
    series = {name: tuple(zip(*points, strict=True)) for name, points in quality.items()}
    title = "the same U-Net, as many steps, in pixels (f = 1) and in latents"
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


def sampling_speed(pipeline: Pipeline, captions: list[str]) -> float:
    """Measure images a second, from caption to pixels."""
    generated = 0
    pipeline(captions[:2], steps=1)
    started = time.monotonic()
    while generated == 0 or time.monotonic() - started < LONG_ENOUGH:
        generated += len(pipeline(captions))
    return generated / (time.monotonic() - started)
