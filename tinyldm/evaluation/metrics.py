"""Metrics of a model, each with a reference value to compare it with."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tinyldm.backend import to_device
from tinyldm.data.dataset import Dataset
from tinyldm.data.shapes import ATTRIBUTES, Attributes, make_shapes
from tinyldm.evaluation.likelihood import bits_per_dim
from tinyldm.evaluation.reader import drawing_distance, score
from tinyldm.evaluation.scenes import compare, concat_conditioning, generate, task_input
from tinyldm.evaluation.statistics import (
    copied,
    frechet_distance,
    kernel_distance,
    nearest_images,
    precision_recall,
    psnr,
    ssim,
)
from tinyldm.models import ClassNames
from tinyldm.progress import Bar
from tinyldm.sampling.pipeline import Pipeline

SEED = 20_260_101  # of images, captions and noise for scoring: none of them is in a training set
BATCH = 50
DRAWS = 8  # of noise, for each image whose likelihood is estimated
BANDS = 5  # of noise levels, from the least to the most
FEWEST_FOR_COPIES = 19  # held-out images, to know what the nearest 5 % of them are
NEIGHBOURS = 3  # the k-th nearest, of precision and recall
DRAWN = 200  # images whose distance from true drawings is measured
CELLS = 4  # positions along each side of the latents that features are averaged over

Describe = Callable[[np.ndarray], np.ndarray]  # of uint8 images (n, h, w, 3): float64 (n, d)


def loss_by_noise(pipeline: Pipeline, data: Dataset, bands: int = BANDS) -> list[float]:
    """Measure the denoiser's mean squared error on images, in equal bands of the time step t.

    A loss over all t hides what is learnt: at low noise little is left to remove, at high noise
    only the caption says what to generate. Noise and steps are always the same.
    """
    rng = np.random.default_rng(SEED)
    xp, schedule = pipeline.xp, pipeline.schedule
    latents, condition = pipeline.encode(data.images), pipeline.embed(data.captions)
    concat = concat_conditioning(pipeline, data)
    n, width = len(data), len(schedule) // bands
    losses = []
    for band in range(bands):
        t = band * width + np.arange(n) * width // n
        noise = xp.asarray(rng.standard_normal(latents.shape, dtype=np.float32))
        x = schedule.add_noise(latents, noise, t)
        prediction = pipeline.predict(x, t, condition, concat)
        error = prediction - schedule.target(latents, noise, t)
        losses.append(float((error * error).mean()))
    return losses


def likelihood(pipeline: Pipeline, data: Dataset, seed: int = SEED) -> tuple[float, float]:
    """Estimate bits per dimension of latents given captions; of pixels without a first stage.

    → them, and their standard error.

    For latents it is a density, which can be negative; for pixels it is that of one of 256 levels.
    """
    latents, condition = pipeline.encode(data.images), pipeline.embed(data.captions)
    concat = concat_conditioning(pipeline, data)
    rng = np.random.default_rng(seed)

    def predict(x, t):
        return pipeline.predict(x, t, condition, concat)

    bits, error = bits_per_dim(predict, pipeline.schedule, latents, rng, DRAWS)
    if not pipeline.vae.shapes():  # nothing is learnt: the latents are pixels
        bits += float(np.log2(127.5 / pipeline.vae.config.scaling_factor))
    return bits, error


def evaluate(
    pipeline: Pipeline,
    training: Dataset,
    held_out: Dataset,
    count: int = 500,
    steps: int | None = None,
    guidance: float | None = None,
    shapes: Callable[[str], str] | None = None,
    features: Describe | None = None,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Score a model against its training images and the held-out ones.

    count: images to generate. shapes: turns a caption into the model's prompt; with it attributes
    are read back by rule, and half of the captions of a model of text name held-out pairs. A model
    with a task is conditioned on held-out images and compared with them. features: the features in
    which Fréchet and kernel distance, precision and recall are measured, by default
    `latent_features`; the caller notes others as result["features"].
    Returns what eval.json holds, and the samples nearest to training images with those images:
    {"samples", "nearest": uint8 (n, h, w, 3)}.
    """
    true = held_out if len(held_out) else training
    decoded = pipeline.decode(pipeline.encode(true.images))
    sets = {"training": training, "held_out": held_out}
    some = {name: data.pick(range(min(len(data), 256))) for name, data in sets.items() if len(data)}
    result = {
        "images": {"trained_on": len(training), "held_out": len(held_out)},
        "psnr": psnr(decoded, true.images),
        "ssim": ssim(decoded, true.images),
        "loss_by_noise": {name: loss_by_noise(pipeline, data) for name, data in some.items()},
    }
    bits = {name: likelihood(pipeline, data) for name, data in some.items()}
    result["bits"] = {name: value for name, (value, _) in bits.items()}
    result["bits_error"] = {name: error for name, (_, error) in bits.items()}
    with Bar(total=count, desc="sampling", unit="image", disable=None) as bar:

        def generated_of(prompts, scene=None):
            return _generate(pipeline, prompts, scene, bar, steps=steps, guidance=guidance)

        if pipeline.task != "generation":
            generated = _score_task(pipeline, generated_of, count, true, shapes, result)
        elif shapes:
            generated = _score_shapes(pipeline, generated_of, count, shapes, result)
        else:
            generated = generated_of([true.captions[i % len(true)] for i in range(count)])
    if features is None:
        features = partial(latent_features, pipeline)
        result["features"] = {"kind": "latents"}
    return result, _compare(features, generated, training, held_out, result)


def _score_shapes(pipeline, generated_of, count, prompt_of, result):
    """Score attributes by rule, on real, reconstructed and generated images."""
    side = pipeline.size[0]
    sets = {"seen": False}
    if not isinstance(pipeline.tokenizer, ClassNames):  # a held-out pair is no class
        sets["held_out"] = True
    n = max(1, count // len(sets))
    truth, captions = make_shapes(n, side, SEED)
    result["captions"] = n * len(sets)
    result["reader"] = score(truth, captions)
    decoded = pipeline.decode(pipeline.encode(truth))
    result["reconstructed"] = score(decoded, captions)
    result["drawing"] = {"reconstructed": from_drawings(decoded, captions)}
    generated = {}
    for name, unseen in sets.items():
        asked = make_shapes(n, side, SEED, unseen)[1]
        prompts = [prompt_of(caption) for caption in asked]
        generated[name] = generated_of(prompts)
        result[name] = score(generated[name], prompts)
        if prompts == asked:  # a class alone leaves colours and place open
            result["drawing"][name] = from_drawings(generated[name], prompts)
    return generated["seen"]  # the held-out pairs are meant to differ from all that was trained on


def from_drawings(images: np.ndarray, captions: Sequence[str]) -> float:
    """Compute the median distance of images from the nearest true drawings of their captions."""
    some = range(min(len(images), DRAWN))
    drawn = [drawing_distance(images[i], Attributes.parse(captions[i])) for i in some]
    return float(np.median(drawn))


def _score_task(pipeline, generated_of, count, true, shapes, result):
    """Score a model with a task, conditioned on real images."""
    truth = true.pick([i % len(true) for i in range(count)])
    scene = task_input(pipeline.task, truth, shapes is not None)
    generated = generated_of(truth.captions, scene)
    result["task"] = {"name": pipeline.task} | compare(scene, generated, truth.images)
    if shapes:
        result["captions"] = len(truth)
        for name, images in (
            ("reader", truth.images),
            ("reconstructed", pipeline.decode(pipeline.encode(truth.images))),
            ("seen", generated),
        ):
            result[name] = score(images, truth.captions)
    return generated


def _generate(pipeline, prompts, scene, bar, **options) -> np.ndarray:
    generated = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        some = scene and scene.pick(part)
        generated.append(generate(pipeline, prompts[part], some, seed=SEED + start, **options))
        bar.update(len(prompts[part]))
    return np.concatenate(generated)


def _compare(features, generated, training, held_out, result):
    """Compare generated with real images; → those nearest to training images, and the latter."""
    at, distance = nearest_images(generated, training.images)
    result["nearest"] = {"generated": float(np.median(distance))}
    if len(held_out) > 1:
        _, real_distance = nearest_images(held_out.images, training.images)
        result["nearest"]["held_out"] = float(np.median(real_distance))
        if len(held_out) >= FEWEST_FOR_COPIES:
            result["nearest"]["copied"] = copied(distance, real_distance)
    n = min(len(generated), len(held_out)) if len(held_out) > 1 else len(generated)
    some = training.pick(np.linspace(0, len(training) - 1, min(len(training), 2048)).astype(int))
    real = features(some.images)
    for name, images in (("generated", generated), ("held_out", held_out.images)):
        made = features(images[:n]) if len(images) else real[:0]  # equally many, to compare
        if min(len(made), len(real)) > 1:  # one image has no covariance
            result.setdefault("frechet", {})[name] = frechet_distance(made, real)
            result.setdefault("kernel", {})[name] = kernel_distance(made, real)
        if min(len(made), len(real)) > NEIGHBOURS:
            precision, recall = precision_recall(made, real, NEIGHBOURS)
            result.setdefault("precision", {})[name] = precision
            result.setdefault("recall", {})[name] = recall
    closest = np.argsort(distance, kind="stable")[:12]
    return {"samples": generated[closest], "nearest": training.images[at[closest]]}


def latent_features(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Features (n, d) of images: the first stage's latents, averaged over a coarse grid."""
    latents = to_device(pipeline.encode(images), "cpu")
    n, h, w, c = latents.shape
    rows, columns = (np.array_split(np.arange(side), min(side, CELLS)) for side in (h, w))
    cells = [latents[:, r][:, :, q].mean(axis=(1, 2)) for r in rows for q in columns]
    return np.concatenate(cells, axis=1).astype(np.float64)


def table(result: dict) -> str:
    """Format the result of `evaluate` as lines of text, each value with what it means."""
    lines = []
    if "seen" in result:
        rows = {
            "attribute reader, real images": result["reader"],
            "first stage, reconstructions": result["reconstructed"],
            "generated, combinations seen": result["seen"],
        }
        if "held_out" in result:
            rows["generated, combinations held out"] = result["held_out"]
        names = [*ATTRIBUTES, "all"]
        lines.append("right by rule, in %".ljust(32) + "".join(f"{name:>12}" for name in names))
        for title, row in rows.items():
            shares = "".join(
                f"{100 * row[name]:12.1f}" if name in row else " " * 12 for name in names
            )
            lines.append(title.ljust(32) + shares)
        if "seen" in result.get("drawing", {}):
            distances = result["drawing"]
            numbers = f"{distances['seen']:.1f} (reconstructions {distances['reconstructed']:.1f})"
            meaning = "median difference from the nearest drawing of the caption, of 255"
            lines.append(_row("distance from true drawings", numbers, meaning))
        lines.append(f"{result['captions']} images generated\n")
    unseen = "held_out" in result["loss_by_noise"]
    which = "held-out images" if unseen else "training images (none are held out)"
    lines += [
        f"{which}: {result['images']['held_out' if unseen else 'trained_on']}",
        _row("first stage, PSNR", f"{result['psnr']:.1f} dB",
             "decoded against the image; 30 is soft, 40 is hard to tell apart"),
        _row("first stage, SSIM", f"{result['ssim']:.3f}", "structural similarity; 1 is equal"),
    ]  # fmt: skip
    lines += _rows_of_task(result.get("task", {}))
    for name, losses in result["loss_by_noise"].items():
        numbers = " ".join(f"{loss:.3f}" for loss in losses)
        lines.append(_row(f"loss by noise, {name.replace('_', '-')}", numbers, ""))
    lines.append(_row("", "", "from little noise to nearly all; far apart means overfitting"))
    bits = {
        name: f"{value:.2f} ± {result['bits_error'][name]:.2f}"
        for name, value in result["bits"].items()
    }
    bits = bits["training"] + (f" (held-out {bits['held_out']})" if unseen else "")
    meaning = "upper bound, per latent value (per pixel value, without a first stage)"
    lines.append(_row("bits per dimension", bits, meaning))
    if "frechet" in result:
        lines.append(_compared_by(result["features"]))
    meanings = {
        "frechet": ("Fréchet distance", "of generated to training images; 0 is alike"),
        "kernel": ("kernel distance", "KID, without assuming Gaussians; about 0 is alike"),
        "precision": ("precision", "share of generated images that lie among training images"),
        "recall": ("recall", "share of training images that lie among generated ones"),
        "nearest": ("nearest training image", "median difference, in levels of 255"),
    }
    for key, (title, meaning) in meanings.items():
        if key not in result:
            continue
        numbers = f"{result[key]['generated']:.3f}"
        if "held_out" in result[key]:
            numbers += f" (held-out {result[key]['held_out']:.3f})"
        lines.append(_row(title, numbers, meaning))
    if "copied" in result["nearest"]:
        share = f"{100 * result['nearest']['copied']:.1f} %"
        lines.append(_row("copied from training", share,
                          "nearer to a training image than 95 % of held-out ones are; "
                          "about 5 % means that nothing is copied"))  # fmt: skip
    return "\n".join(lines)


def _rows_of_task(task):
    name = task.get("name")
    if not task.keys() & {"psnr", "psnr_seen"}:
        return []
    if "psnr_seen" in task:
        meaning = "of the unmasked part, generated against the image"
        return [_row(f"{name}, PSNR", f"{task['psnr_seen']:.1f} dB", meaning)]
    meaning = "generated against the image (in brackets: the input)"
    psnrs = f"{task['psnr']:.1f} dB (given {task['psnr_given']:.1f} dB)"
    ssims = f"{task['ssim']:.3f} (given {task['ssim_given']:.3f})"
    return [_row(f"{name}, PSNR", psnrs, meaning), _row(f"{name}, SSIM", ssims, "")]


def _compared_by(features):
    if features["kind"] == "latents":
        return _row("images compared by", "latents", "averaged over a coarse grid")
    meaning = f"right on {100 * features['accuracy']:.1f} % of held-out images"
    return _row("images compared by", "features of a classifier", meaning)


def _row(title, numbers, meaning):
    return f"{title:32}{numbers:34}{meaning}".rstrip()
