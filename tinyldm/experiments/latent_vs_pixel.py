"""Latents against pixels: cheaper at the same quality? (Rombach et al. 2022, section 4.1)

The same U-Net is trained on 64×64 shapes at f = 1 (pixels), 2, 4 and 8: for equal time, and for
as many steps as f = 1 makes in it. The cost of the first stage is counted by itself, as in the
paper. Measured are images a second in training and in sampling (decoding included), and the
share of captions whose image is right, by rule. So are the kernel distance from real images in
the features of a classifier, and the PSNR of the first stage.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyldm.data.dataset import Dataset
from tinyldm.data.shapes import make_shapes
from tinyldm.evaluation.figures import curves, grid, save_image
from tinyldm.evaluation.scenes import generate
from tinyldm.evaluation.statistics import kernel_distance, psnr
from tinyldm.experiments.scoring import accuracy
from tinyldm.files import replacing, write_json
from tinyldm.models import Tokenizer
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.classifier import fit_classifier
from tinyldm.training.config import Config, Stage
from tinyldm.training.estimate import estimate_run
from tinyldm.training.loop import Job, fit
from tinyldm.training.networks import Models, denoiser_loss
from tinyldm.training.preparation import load_data
from tinyldm.training.run import Run, export, second_stage
from tinyldm.training.signals import Interruptible
from tinyldm.training.state import State

FACTORS = (1, 2, 4, 8)
WIDTHS = (16, 32, 64, 64)  # of the autoencoder, as many as its levels
BASE = Config(
    preset="latent-vs-pixel", side=64, images=8192 + 256, unet_widths=(48, 64, 96), text_width=64
)
LOOKS = (0.25, 0.5)  # shares of the time after which quality is measured, besides the end
CLASSIFIER_SECONDS = 30.0  # of training, for the classifier
SHOWN = 9  # images of each f
CAPTIONS = 10, 100  # to generate for a measurement, at least and at most
TIMED, LONG_ENOUGH = 8, 3.0  # images of a batch, repeated for so many seconds

Say = Callable[[str], None]


@dataclass
class Trained:
    """A U-Net after its training."""

    pipeline: Pipeline
    steps: int
    seconds: float  # of training, nothing else
    quality: list[tuple[float, float]]  # (seconds so far, share of captions right)
    images: np.ndarray  # generated in the end


def run(seconds: float, out: Path, say: Say) -> list[dict]:
    """Train and score all f; writes results.json, table.md, quality.png and samples.png; → rows."""
    base, captions = BASE, None
    data = load_data(base)
    training, held_out = data.split(256 / base.images, base.seed)
    classifier = fit_classifier(training, held_out, CLASSIFIER_SECONDS, say=say)
    true = classifier.features(held_out.images)
    rows, trained = [], {}
    with Interruptible() as stop:
        for f in FACTORS:
            config = replace(
                base,
                first_stage="none" if f == 1 else "kl",
                vae_widths=WIDTHS[: f.bit_length()],
                autoencoder=replace(base.autoencoder, steps=None, seconds=seconds),
                denoiser=replace(base.denoiser, steps=None, seconds=seconds),
            )
            steps = estimate_run(config, len(training)).steps
            stages = {name: replace(getattr(config, name), steps=n) for name, n in steps.items()}
            config = replace(config, **stages)
            tokenizer = Tokenizer.train(data.captions, config.vocabulary, config.tokens)
            place = Trial(out / f"f{f}", config, tokenizer, training, held_out, stop, say)
            if captions is None:  # as many for all as f = 1, the slowest, samples in half the time
                speed = sampling_speed(place.untrained())
                captions = int(np.clip(speed * seconds / 2, *CAPTIONS))
                say(f"quality is measured on {captions} captions")
            place.captions = captions
            started = time.monotonic()
            first_stage = place.train_first_stage()
            first_seconds = time.monotonic() - started if first_stage else 0.0
            one = place.train_unet(first_stage, config.denoiser, LOOKS)
            trained[f] = one
            row = {
                "f": f,
                "seconds": one.seconds,
                "steps": one.steps,
                "train_images_per_s": one.steps * config.denoiser.batch / one.seconds,
                "sample_images_per_s": sampling_speed(one.pipeline),
                "accuracy_all": one.quality[-1][1],
                "kernel_distance": kernel_distance(classifier.features(one.images), true),
                "psnr": first_stage_psnr(one.pipeline, held_out),
                "first_stage_seconds": first_seconds,
            }
            if f > 1:
                as_many = replace(config.denoiser, steps=rows[0]["steps"], seconds=None)
                other = place.train_unet(first_stage, as_many, ())
                row["equal_steps"] = {
                    "steps": other.steps,
                    "seconds": other.seconds,
                    "accuracy_all": other.quality[-1][1],
                }
            rows.append(row)
            write_json(out / "results.json", rows)
            say(f"f = {f}: {row['accuracy_all']:.0%} of the captions are right")
    sheets = [one.images[:SHOWN] for one in trained.values()]
    save_image(
        out / "samples.png",
        grid(np.concatenate(sheets), columns=len(sheets[0]), labels=[f"f = {f}" for f in FACTORS]),
    )
    lines = {f"f = {f}": tuple(zip(*one.quality, strict=True)) for f, one in trained.items()}
    title = "captions right against seconds of training"
    save_image(out / "quality.png", curves(lines, title, logarithmic=False))
    with replacing(out / "table.md") as temporary:
        temporary.write_text(table(rows), encoding="utf-8")
    return rows


@dataclass
class Trial:
    """The folder, config and data with which one f is trained."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    training: Dataset
    held_out: Dataset
    stop: Interruptible
    say: Say
    captions: int = CAPTIONS[0]

    def __post_init__(self):
        self.models = Models(self.config, self.tokenizer)
        (self.folder / "training").mkdir(parents=True, exist_ok=True)

    def train_first_stage(self) -> dict:
        """Train the first stage → its averaged weights; none for pixels."""
        params = self.models.vae.init(np.random.default_rng((self.config.seed, 0)))
        if not params:
            return {}
        run = self._run(State(self.config, "autoencoder", params, self.tokenizer, ""))
        run.fit_autoencoder(self.stop)
        return dict(run.state.average)

    def untrained(self) -> Pipeline:
        """Return a pipeline in pixels before any training, to time sampling."""
        return self._export(self._second_stage(self.config, {}))

    def train_unet(self, first_stage: dict, stage: Stage, looks: tuple[float, ...]) -> Trained:
        """Train the same U-Net from the same start, for the length of `stage`."""
        config = replace(self.config, denoiser=stage)
        state = self._second_stage(config, first_stage)
        batch_at, _ = self._run(state).latent_batches()
        clock = Clock()
        quality, few = [], max(1, self.captions // 3)

        def after_step():
            now = clock.read()
            if state.total and state.step in {round(share * state.total) for share in looks}:
                clock.stop()
                quality.append((now, accuracy(*generated(self._export(state), few))))
                clock.go()

        clock.go()
        job = Job(denoiser_loss(self.models), batch_at, self.say, after_step=after_step)
        fit(self.folder, state, job, self.stop)
        clock.stop()
        pipeline = self._export(state)
        images, captions = generated(pipeline, self.captions)
        quality.append((clock.read(), accuracy(images, captions)))
        return Trained(pipeline, state.step, clock.read(), quality, images)

    def _second_stage(self, config, first_stage):
        data = self.training, "", 0
        return second_stage(config, self.models, first_stage, *data, "cpu", self.say)

    def _run(self, state):
        data = self.training, self.held_out
        return Run(self.folder, state, self.models, *data, "cpu", self.say)

    def _export(self, state):
        return export(self.folder, state, self.models)


class Clock:
    """A stopwatch: the seconds that it has run."""

    def __init__(self):
        self.passed, self.since = 0.0, None

    def go(self) -> None:
        """Start or resume the stopwatch."""
        self.since = time.monotonic()

    def stop(self) -> None:
        """Pause the stopwatch."""
        self.passed, self.since = self.read(), None

    def read(self) -> float:
        """Return the seconds so far."""
        return self.passed + (time.monotonic() - self.since if self.since else 0.0)


def prompts() -> list[str]:
    """Return captions to generate, none of whose images were trained on."""
    return make_shapes(CAPTIONS[1], 16, seed=20_261_125)[1]


def generated(pipeline: Pipeline, count: int) -> tuple[np.ndarray, list[str]]:
    """Generate `count` images, uint8 (n, 64, 64, 3) → images, captions."""
    captions = prompts()[:count]
    return generate(pipeline, captions), captions


def sampling_speed(pipeline: Pipeline) -> float:
    """Measure images a second, from caption to pixels."""
    captions, generated = prompts()[:TIMED], 0
    pipeline(captions[:2], steps=1)
    started = time.monotonic()
    while generated == 0 or time.monotonic() - started < LONG_ENOUGH:
        generated += len(pipeline(captions))
    return generated / (time.monotonic() - started)


def first_stage_psnr(pipeline: Pipeline, held_out: Dataset) -> float:
    """Compute the PSNR of held-out images, in dB; 100 where nothing is lost."""
    images = held_out.images[:128]
    decoded = pipeline.decode(pipeline.encode(images))
    return min(100.0, psnr(decoded, images))


def table(rows: list[dict]) -> str:
    """Format the rows in Markdown, each relative to f = 1."""
    first = rows[0]
    lines = [
        "| f | steps | training, images/s | sampling, images/s | captions right | the same after "
        f"{first['steps']:,} steps | distance from real images | first stage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = [
            f"{row[key]:.3g} ({row[key] / first[key]:.1f}×)"
            for key in ("train_images_per_s", "sample_images_per_s")
        ]
        equal = row.get("equal_steps", row)["accuracy_all"]
        loss = "none" if row["psnr"] >= 100 else f"{row['psnr']:.1f} dB"
        lines.append(
            f"| {row['f']} | {row['steps']:,} | {speeds[0]} | {speeds[1]} | "
            f"{row['accuracy_all']:.0%} | {equal:.0%} | {row['kernel_distance']:.3f} | {loss} |"
        )
    return "\n".join(lines) + "\n"
