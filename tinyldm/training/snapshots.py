"""Snapshots of a run in training: images in `samples/`, and metrics of held-out images."""

from pathlib import Path

import numpy as np

from tinyldm.backend import Array, array_module, to_device
from tinyldm.data.dataset import Dataset
from tinyldm.data.images import from_uint8, in_channels, to_uint8
from tinyldm.data.shapes import attributes_in
from tinyldm.evaluation.figures import (
    enlarge,
    grid,
    latents_as_images,
    save_animation,
    save_image,
)
from tinyldm.evaluation.metrics import BANDS, loss_by_noise
from tinyldm.evaluation.plots import Curves, save_plot
from tinyldm.evaluation.reader import score
from tinyldm.evaluation.reverse import guesses, start_noise, trajectory
from tinyldm.evaluation.scenes import generate, masked_images, task_input
from tinyldm.evaluation.statistics import psnr
from tinyldm.models import AutoencoderKL, VQModel
from tinyldm.nn import no_grad
from tinyldm.sampling.init_image import Scene
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.threads import map_batch
from tinyldm.training.config import STAGES
from tinyldm.training.metrics import read_metrics

SHARES = (0.03, 0.1, 0.3, 0.6, 1.0)  # of a stage after which it reports
EVERY = 600.0  # seconds, at the latest
FORWARD_STEPS = (0, 100, 200, 300, 400, 500, 600, 800, 999)
GUIDANCES = (1, 2, 4, 8)
ONE_WORD_CHANGED = [
    "a large red circle on blue at the left",
    "a small red circle on blue at the left",
    "a large green circle on blue at the left",
    "a large red square on blue at the left",
    "a large red circle on white at the left",
    "a large red circle on blue at the right",
]
SCENES = 9  # images that a task is conditioned on
UNSEEN = [  # pairs of shape and colour that are held out of training
    "a large red triangle on white at the center",
    "a small blue circle on yellow at the left",
    "a large yellow square on purple at the top",
    "a small purple triangle on green at the right",
    "a large orange circle on black at the bottom",
    "a large blue circle on red at the center",
]
FEW = slice(6)  # of the images, in the film of the reverse process
BAND_NAMES = [f"t = {i * 1000 // BANDS}–{(i + 1) * 1000 // BANDS - 1}" for i in range(BANDS)]
MOST = 128  # held-out images that a report looks at


def due(step: int, total: int | None, seconds: float) -> bool:
    """Return whether to report after this step of `total`, `seconds` after the last report."""
    if total is None:
        return False
    return seconds > EVERY or step in {round(share * total) for share in SHARES}


def data(run: Path, training: Dataset) -> None:
    """Save data.png, training images with their captions."""
    some = training.pick(range(min(18, len(training))))
    save_image(run / "samples" / "data.png", grid(some.images, some.captions, columns=6))
    if some.maps is not None:
        save_image(run / "samples" / "maps.png", grid(some.maps, some.captions, columns=6))


def autoencoder(
    vae: AutoencoderKL | VQModel, params: dict[str, Array], held_out: Dataset
) -> tuple[dict, str]:
    """Measure stage 1 on held-out images: ({name: value}, a text)."""
    if not len(held_out):
        return {}, ""
    images = held_out.images[:MOST]

    def reconstruct(x):
        with no_grad():
            return vae.decode(params, vae.sample(params, x)[0])[0]

    xp = array_module(next(iter(params.values())))
    pixels = in_channels(from_uint8(images), vae.config.in_channels)
    on_device = xp.asarray(pixels)
    decoded = to_device(map_batch(reconstruct, on_device), "cpu")
    validation = float(np.square(decoded - pixels).mean())
    quality = float(psnr(to_uint8(decoded), images).mean())
    described = vae.describe(params, on_device)
    text = ", ".join(f"{name} {value:.2f}" for name, value in described.items())
    numbers = {"validation": validation, "psnr": quality} | described
    return numbers, f"; held-out images: {validation:.4f}, {quality:.1f} dB, {text}"


def first_stage(run: Path, pipeline: Pipeline, training: Dataset) -> None:
    """Save forward.png (the forward process) and reconstructions.png, once stage 1 is done."""
    folder, schedule = run / "samples", pipeline.schedule
    latents = to_device(pipeline.encode(training.images[:1]), "cpu")[0]
    noise = np.random.default_rng(0).standard_normal(latents.shape, dtype=np.float32)
    t = [min(t, len(schedule) - 1) for t in FORWARD_STEPS]
    noisy = np.stack([schedule.add_noise(latents[None], noise, [step])[0] for step in t])
    pixels = from_uint8(training.images[:1])
    pixel_noise = np.random.default_rng(1).standard_normal(pixels.shape[1:], dtype=np.float32)
    in_pixels = np.stack([schedule.add_noise(pixels, pixel_noise, [step])[0] for step in t])
    rows = [
        to_uint8(in_pixels),
        enlarge(latents_as_images(noisy), pipeline.vae.factor),
        pipeline.decode(pipeline.xp.asarray(noisy)),
    ]
    labels, titles = ["pixels", "latents", "decoded"], [f"t = {step}" for step in t]
    strip = grid(np.concatenate(rows), columns=len(t), labels=labels, titles=titles)
    save_image(folder / "forward.png", strip)
    some = training.images[:9]
    back = pipeline.decode(pipeline.encode(some))
    pair = grid(np.concatenate([some, back]), columns=len(some), labels=["image", "decoded"])
    save_image(folder / "reconstructions.png", pair)


def denoiser(
    run: Path, pipeline: Pipeline, training: Dataset, held_out: Dataset, step: int
) -> tuple[dict, str]:
    """Save step-….png, and measure stage 2: ({name: value}, a text)."""
    numbers, text = {}, ""
    if len(held_out):
        bands = loss_by_noise(pipeline, held_out.pick(range(min(MOST, len(held_out)))))
        numbers = {"validation": float(np.mean(bands)), "by_noise": bands}
        text = f"; held-out images: {numbers['validation']:.4f}, from little noise to much: "
        text += " ".join(f"{loss:.3f}" for loss in bands)
    file = run / "samples" / f"step-{step:06d}.png"
    if pipeline.task == "generation":
        prompts = prompts_for(training)
        images = generate_samples(pipeline, prompts, file)
    else:
        prompts, images = generate_scenes(pipeline, held_out if len(held_out) else training, file)
    if training.readable:
        right = score(images, prompts)
        numbers["right"] = right
        counts = ", ".join(f"{name} {round(len(prompts) * x)}" for name, x in right.items())
        text += f"; right in {len(prompts)} samples: {counts}"
    return numbers, text


def finished(run: Path, pipeline: Pipeline, training: Dataset, held_out: Dataset) -> None:
    """Save samples.png, reverse.png and .webp, and plots of the losses.

    For generation it also saves guidance.png and, of captions of shapes, words.png.
    """
    folder = run / "samples"
    if pipeline.task == "generation":
        prompts, scene = prompts_for(training), None
        generate_samples(pipeline, prompts, folder / "samples.png")
        sweep_guidance(pipeline, prompts[:6], folder / "guidance.png")
        if _has_captions_of_shapes(training):
            change_words(pipeline, folder / "words.png")
    else:
        data = held_out if len(held_out) else training
        prompts, _ = generate_scenes(pipeline, data, folder / "samples.png")
        scene = task_input(pipeline.task, data.pick(range(len(prompts))), data.readable).pick(FEW)
    reverse_process(pipeline, prompts[FEW], scene, folder)
    draw_losses(run)


def reverse_process(
    pipeline: Pipeline, prompts: list[str], scene: Scene | None, folder: Path
) -> None:
    """Save reverse.webp, noise becoming images, and reverse.png, the first of them.

    Both have x_t, and the x_0 that is guessed from it. For generation reverse.png has a third row:
    what is guessed from the same x_t without the caption.
    """
    path = trajectory(pipeline, prompts, scene)
    states, goals = ([pipeline.decode(x) for x in of] for of in (path.states, path.guesses))
    frames = []
    for t, state, goal in zip(path.t, states, goals, strict=True):
        titles, both = [f"t = {t}"], np.concatenate([state, goal])
        frames.append(grid(both, columns=len(state), labels=["x", "guess"], titles=titles))
    save_animation(folder / "reverse.webp", frames)
    chosen = np.linspace(0, len(states) - 1, min(9, len(states))).astype(int)
    rows = {"x at t": [states[i][0] for i in chosen], "its guess": [goals[i][0] for i in chosen]}
    if pipeline.task == "generation":
        rows["without\ncaption"] = guesses(pipeline, path, [""] * len(prompts))[chosen, 0]
    titles = [f"t = {path.t[i]}" for i in chosen]
    images = np.concatenate([np.stack(row) for row in rows.values()])
    strip = grid(images, columns=len(chosen), labels=list(rows), titles=titles)
    save_image(folder / "reverse.png", strip)


def generate_samples(pipeline: Pipeline, prompts: list[str], file: Path) -> np.ndarray:
    """Generate an image per prompt from the same noise → uint8 (n, h, w, 3); save a grid."""
    images = generate(pipeline, prompts)
    labels = ["", "", "held out"] if prompts[12:] == UNSEEN else None
    save_image(file, grid(images, prompts, columns=6, labels=labels))
    return images


def generate_scenes(pipeline: Pipeline, data: Dataset, file: Path) -> tuple[list[str], np.ndarray]:
    """Generate images of a task, and save rows of its inputs, the results and the real images.

    → their captions, and what is generated: uint8 (n, h, w, 3).
    """
    some = data.pick(range(min(SCENES, len(data))))
    prompts = list(some.captions)
    scene = task_input(pipeline.task, some, some.readable)
    generated = generate(pipeline, prompts, scene)
    rows = np.concatenate([masked_images(scene), generated, some.images])
    save_image(file, grid(rows, columns=len(some), labels=["input", "generated", "image"]))
    return prompts, generated


def sweep_guidance(pipeline: Pipeline, prompts: list[str], file: Path) -> None:
    """Save images at rising guidance, same noise and captions: variety and tones suffer."""
    images = np.concatenate([generate(pipeline, prompts, guidance=g) for g in GUIDANCES])
    labels = [f"guidance {g}" for g in GUIDANCES]
    captions = [""] * (len(images) - len(prompts)) + prompts
    save_image(file, grid(images, captions, columns=len(prompts), labels=labels))


def change_words(pipeline: Pipeline, file: Path) -> None:
    """Save images of one noise and one caption, with one word changed at a time."""
    latents = start_noise(pipeline, 1).repeat(len(ONE_WORD_CHANGED), axis=0)
    images = np.stack(list(map(np.asarray, pipeline(ONE_WORD_CHANGED, latents=latents))))
    save_image(file, grid(images, ONE_WORD_CHANGED, columns=len(images)))


def prompts_for(training: Dataset) -> list[str]:
    """Return up to 18 captions for samples: the first different ones; held-out pairs of shapes."""
    prompts = list(dict.fromkeys(training.captions))[:18]
    if not _has_captions_of_shapes(training):
        return (prompts * 18)[:18] if len(prompts) < 6 else prompts
    return prompts[:12] + UNSEEN


def _has_captions_of_shapes(training):
    """Return whether the captions are sentences on shapes, not only their classes."""
    return training.readable and len(attributes_in(training.captions[0])) > 1


def draw_losses(run: Path) -> None:
    """Plot the losses of both stages, and loss-by-noise.png, where matplotlib is installed."""
    for name, curves in losses_of(run).items():
        save_plot(run / "samples" / f"{name}.png", curves)


def losses_of(run: Path, window: int = 20) -> dict[str, Curves]:
    """Return what there is to plot of a run's losses, averaged over `window` lines of its log."""
    entries, found = read_metrics(run / "training" / "metrics.jsonl"), {}
    for stage in STAGES:
        series = {}
        of_stage = [e for e in entries if e["stage"] == stage and "loss" in e]
        if of_stage:
            losses = np.array([e["loss"] for e in of_stage])
            smooth = [losses[max(0, i - window) : i + 1].mean() for i in range(len(losses))]
            series["in training"] = ([e["step"] for e in of_stage], smooth)
        checked = [e for e in entries if e["stage"] == stage and "validation" in e]
        if checked:
            points = [e["validation"] for e in checked]
            series["held-out images"] = ([e["step"] for e in checked], points)
        if series:
            # The first stage gains digits, the second hardly moves: so one is logarithmic.
            title, logarithmic = f"{stage}: loss", stage == STAGES[0]
            found[f"loss-{stage}"] = Curves(series, title, "step", "loss", logarithmic)
    banded = [e for e in entries if "by_noise" in e]
    if banded:
        steps, title = (
            [e["step"] for e in banded],
            "denoiser: loss on held-out images, by time step",
        )
        bands = {
            name: (steps, [e["by_noise"][i] for e in banded]) for i, name in enumerate(BAND_NAMES)
        }
        y = "squared error of the prediction"
        found["loss-by-noise"] = Curves(bands, title, "step", y, False)
    return found
