"""The pictures that a run leaves in `samples/` on its way."""

import json
from pathlib import Path

import numpy as np

from tinyldm.data.shapes import Attributes
from tinyldm.evaluation.pictures import (
    curves,
    enlarge,
    grid,
    latents_as_pictures,
    save_animation,
    save_picture,
)

SHARES = (0.1, 0.3, 0.6)  # of stage 2 after which samples are painted
FORWARD_STEPS = (0, 100, 200, 300, 400, 500, 600, 800, 999)


def data(run, images, captions):
    """data.png: what the model is to learn."""
    save_picture(Path(run) / "samples" / "data.png", grid(images[:18], captions[:18], columns=6))


class Progress:
    """Pictures of stage 2: its noise, its first stage, samples from the same noise as it learns.

    export: `export() → the Pipeline as it is now`, saved in the run.
    """

    def __init__(self, run, export, captions, images):
        self.folder, self.export = Path(run) / "samples", export
        self.prompts, self.images = prompts_for(captions), images

    def before(self, latents, schedule):
        """forward.png (the forward process) and reconstructions.png (the first stage)."""
        pipeline = self.export()
        noise = np.random.default_rng(0).standard_normal(latents.shape[1:], dtype=np.float32)
        t = [min(t, len(schedule) - 1) for t in FORWARD_STEPS]
        noisy = np.stack([schedule.add_noise(latents[:1], noise, [step])[0] for step in t])
        pixels = self.images[:1] / np.float32(127.5) - 1
        pixel_noise = np.random.default_rng(1).standard_normal(pixels.shape[1:], dtype=np.float32)
        in_pixels = np.stack([schedule.add_noise(pixels, pixel_noise, [step])[0] for step in t])
        factor = pixels.shape[1] // latents.shape[1]
        rows = [
            np.clip(127.5 * (in_pixels + 1), 0, 255).astype(np.uint8),
            enlarge(latents_as_pictures(noisy), factor),
            pipeline.decode(pipeline.xp.asarray(noisy)),
        ]
        strip = grid(np.concatenate(rows), columns=len(t), labels=["pixels", "latents", "decoded"])
        save_picture(self.folder / "forward.png", strip)
        some = self.images[:9]
        back = pipeline.decode(pipeline.encode(some))
        pair = grid(np.concatenate([some, back]), columns=len(some), labels=["picture", "decoded"])
        save_picture(self.folder / "reconstructions.png", pair)

    def after_step(self, step, total):
        if total and step in {int(share * total) for share in SHARES}:
            paint_samples(self.export(), self.prompts, self.folder / f"step-{step:06d}.png")


def finished(run, pipeline, captions):
    """samples.png, reverse.png and reverse.webp (the reverse process), loss.png."""
    folder = Path(run) / "samples"
    prompts = prompts_for(captions)
    paint_samples(pipeline, prompts, folder / "samples.png")
    frames, states, goals = [], [], []
    for x, x0 in pipeline.denoise(prompts[:6]):
        states.append(pipeline.decode(x))
        goals.append(pipeline.decode(x0))
        both = np.concatenate([states[-1], goals[-1]])
        frames.append(grid(both, columns=len(x), labels=["so far", "its goal"]))
    save_animation(folder / "reverse.webp", frames)
    chosen = np.linspace(0, len(states) - 1, min(9, len(states))).astype(int)
    rows = [[states[i][0] for i in chosen], [goals[i][0] for i in chosen]]
    strip = grid(np.concatenate(rows), columns=len(chosen), labels=["so far", "its goal"])
    save_picture(folder / "reverse.png", strip)
    draw_losses(run)


def paint_samples(pipeline, prompts, file):
    """One picture a prompt, always from the same noise."""
    pictures = [np.asarray(picture) for picture in pipeline(prompts)]
    save_picture(file, grid(np.stack(pictures), prompts, columns=6))


def prompts_for(captions):
    """Eighteen captions to paint: the first different ones, and for shapes also unseen pairs."""
    prompts = list(dict.fromkeys(captions))[:18]
    try:
        Attributes.parse(prompts[0])
    except ValueError:
        return prompts
    unseen = [
        "a large red triangle on white at the center",
        "a small blue circle on yellow at the left",
        "a large yellow square on purple at the top",
        "a small purple triangle on green at the right",
        "a large orange circle on black at the bottom",
        "a large blue circle on red at the center",
    ]
    return prompts[:12] + unseen


def draw_losses(run, window=20):
    """loss.png: both stages' losses, averaged over `window` lines of metrics."""
    lines = (Path(run) / "training" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    series = {}
    for stage in ("autoencoder", "denoiser"):
        entries = [e for e in map(json.loads, lines) if e["stage"] == stage]
        if entries:
            losses = np.array([e["loss"] for e in entries])
            smooth = [losses[max(0, i - window) : i + 1].mean() for i in range(len(losses))]
            series[stage] = ([e["step"] for e in entries], smooth)
    picture = curves(series, "loss against step (a flat denoiser loss is normal)")
    save_picture(Path(run) / "samples" / "loss.png", picture)
