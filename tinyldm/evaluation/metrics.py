"""Metrics of a model, each with a reference value to compare it with."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tinyldm.backend import Array, to_device
from tinyldm.data.dataset import Dataset
from tinyldm.data.images import from_uint8, in_channels
from tinyldm.data.shapes import Attributes, make_shapes
from tinyldm.diffusion.loss import noise_floor
from tinyldm.evaluation.likelihood import bits_per_dim
from tinyldm.evaluation.reader import drawing_distance, score
from tinyldm.evaluation.scenes import compare, concat_conditioning, generate, task_input
from tinyldm.evaluation.statistics import (
    copied,
    frechet_distance,
    jackknife,
    kernel_distance,
    mean_along,
    mean_and_error,
    nearest_images,
    precision_recall,
    psnr,
    share_error,
    ssim,
)
from tinyldm.models import ClassNames
from tinyldm.nn import no_grad
from tinyldm.progress import Bar
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.threads import map_batch

SEED = 20_260_101  # of images, captions and noise for scoring: none of them is in a training set
BATCH = 50
DRAWS = 8  # of noise, for each image whose likelihood is estimated
BANDS = 5  # of noise levels, from the least to the most
FEWEST_FOR_COPIES = 19  # held-out images, to know what the nearest 5 % of them are
NEIGHBOURS = 3  # the k-th nearest, of precision and recall
MOST = 256  # images whose loss, likelihood and reconstruction are measured
PIXELS = 2**14  # of an image, of which 64 may be in memory at once
DRAWN = 200  # images whose distance from true drawings is measured
CELLS = 4  # positions along each side of the latents that features are averaged over

Describe = Callable[[np.ndarray], np.ndarray]  # of uint8 images (n, h, w, 3): float64 (n, d)


class Scores:
    """Scores of a model, and their standard errors under the same names, nested."""

    def __init__(self):
        self.values, self.errors = {}, {}

    def add(self, measured: tuple[float | list, float | list], *names: str) -> None:
        """Add a value and its standard error; one that is not known is None."""
        for root, number in zip((self.values, self.errors), measured, strict=True):
            for name in names[:-1]:
                root = root.setdefault(name, {})
            root[names[-1]] = _plain(number)

    def add_shares(self, shares: dict[str, float], n: int, name: str) -> None:
        """Add shares of n images."""
        for key, share in shares.items():
            self.add((share, share_error(share, n)), name, key)


def _plain(number):
    """Return a number, or a list of them, for JSON: what is not finite is None."""
    if np.ndim(number):
        return [_plain(one) for one in number]
    return float(number) if np.isfinite(number) else None


def losses_by_noise(
    pipeline: Pipeline, data: Dataset, bands: int = BANDS, seed: int = SEED
) -> np.ndarray:
    """Measure the denoiser's squared error on each image, in equal bands of t: (bands, n).

    A loss over all t hides what is learnt: at low noise little is left to remove, at high noise
    only the caption says what to generate. Latents are drawn from their distributions, as in
    training.
    """
    rng = np.random.default_rng(seed)
    xp, schedule = pipeline.xp, pipeline.schedule
    latents, condition = drawn_latents(pipeline, data.images, rng), pipeline.embed(data.captions)
    concat = concat_conditioning(pipeline, data)
    n, width = len(data), len(schedule) // bands
    losses = []
    for band in range(bands):
        t = band * width + np.arange(n) * width // n
        noise = xp.asarray(rng.standard_normal(latents.shape, dtype=np.float32))
        x = schedule.add_noise(latents, noise, t)
        prediction = pipeline.predict(x, t, condition, concat)
        error = prediction - schedule.target(latents, noise, t)
        losses.append(to_device((error * error).mean(axis=(1, 2, 3)), "cpu"))
    return np.array(losses, np.float64)


def floors_by_noise(
    pipeline: Pipeline, images: np.ndarray, bands: int = BANDS
) -> np.ndarray | None:
    """Compute what the latents' own noise leaves of the loss, whoever predicts: (bands, n).

    images: uint8 (n, height, width, 3). None for a first stage that draws no latents.
    """
    vae = pipeline.vae
    if not vae.draws_noise:
        return None

    def part(x):
        return vae.latent_distribution(pipeline.params["vae"], x)[1]

    std = to_device(_of_pixels(pipeline, part, images), "cpu")
    t = np.arange(0, len(pipeline.schedule), max(1, len(pipeline.schedule) // (20 * bands)))
    floors = noise_floor(pipeline.schedule, std * vae.config.scaling_factor, t)
    width = len(pipeline.schedule) // bands
    return np.stack([floors[t // width == band].mean(axis=0) for band in range(bands)])


def drawn_latents(pipeline: Pipeline, images: np.ndarray, rng: np.random.Generator) -> Array:
    """Encode images, uint8 (n, height, width, 3) → latents drawn from what the encoder predicts."""
    vae = pipeline.vae
    n, height, width, _ = images.shape
    shape = n, height // vae.factor, width // vae.factor, vae.latent_channels
    noise = rng.standard_normal(shape, dtype=np.float32)

    def part(x, noise):
        with no_grad():
            return vae.to_latents(pipeline.params["vae"], x, noise)[0]

    return _of_pixels(pipeline, part, images, pipeline.xp.asarray(noise))


def _of_pixels(pipeline, part, images, *others):
    """Call `part(pixels, *others)` for as many images, uint8, at a time as memory should hold."""
    pixels = in_channels(from_uint8(images), pipeline.vae.config.in_channels)
    at_once = max(1, 64 * PIXELS // (images.shape[1] * images.shape[2]))
    return map_batch(part, pipeline.xp.asarray(pixels), *others, size=min(64, at_once))


def loss_by_noise(pipeline: Pipeline, data: Dataset) -> list[float]:
    """Measure the denoiser's mean squared error on images, in equal bands of the time step t.

    Noise and steps are always the same.
    """
    return losses_by_noise(pipeline, data).mean(axis=1).tolist()


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
    seed: int = SEED,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Score a model against its training images and the held-out ones.

    count: images to generate. shapes: turns a caption into the model's prompt; with it attributes
    are read back by rule, and half of the captions of a model of text name held-out pairs. A model
    with a task is conditioned on held-out images and compared with them. features: the features in
    which Fréchet and kernel distance, precision and recall are measured, by default
    `latent_features`; the caller notes others as result["features"]. seed: of the captions, the
    noise, and which images are looked at.
    Returns what eval.json holds, result["error"] being the standard errors, and the samples nearest
    to training images with those images: {"samples", "nearest": uint8 (n, h, w, 3)}.
    """
    rng, scores = np.random.default_rng(seed), Scores()
    true = held_out if len(held_out) else training
    sets = {"training": training, "held_out": held_out}
    some = {name: _drawn(data, MOST, rng) for name, data in sets.items() if len(data)}
    shown = some.get("held_out", some["training"])
    decoded = pipeline.decode(pipeline.encode(shown.images))
    scores.add(mean_and_error(psnr(decoded, shown.images)), "psnr")
    scores.add(mean_and_error(ssim(decoded, shown.images)), "ssim")
    for name, data in some.items():
        losses = losses_by_noise(pipeline, data, seed=seed)
        measured = zip(*map(mean_along, losses), strict=True)  # t rises from image to image
        scores.add(tuple(measured), "loss_by_noise", name)
        scores.add(likelihood(pipeline, data, seed), "bits", name)
    floors = floors_by_noise(pipeline, shown.images)
    if floors is not None:
        scores.add(tuple(zip(*map(mean_and_error, floors), strict=True)), "loss_by_noise", "floor")
    captions = 0
    with Bar(total=count, desc="sampling", unit="image", disable=None) as bar:

        def generated_of(prompts, scene=None):
            nonlocal captions
            captions += len(prompts)
            return _generate(pipeline, prompts, scene, bar, seed, steps=steps, guidance=guidance)

        if pipeline.task != "generation":
            generated = _score_task(pipeline, generated_of, count, true, shapes, scores)
        elif shapes:
            generated = _score_shapes(pipeline, generated_of, count, shapes, scores, seed)
        else:
            generated = generated_of([true.captions[i % len(true)] for i in range(count)])
    images = {"trained_on": len(training), "held_out": len(held_out)}
    result = {"images": images, "captions": captions, "seed": seed}
    if features is None:
        features = partial(latent_features, pipeline)
        result["features"] = {"kind": "latents"}
    nearest = _compare(features, generated, training, held_out, rng, scores)
    return result | scores.values | {"error": scores.errors}, nearest


def _drawn(data, most, rng):
    """Draw images without repetition, at most so many."""
    return data.pick(np.sort(rng.permutation(len(data))[:most]))


def _score_shapes(pipeline, generated_of, count, prompt_of, scores, seed):
    """Score attributes by rule, on real, reconstructed and generated images."""
    side = pipeline.size[0]
    sets = {"seen": False}
    if not isinstance(pipeline.tokenizer, ClassNames):  # a held-out pair is no class
        sets["held_out"] = True
    n = max(1, count // len(sets))
    truth, captions = make_shapes(n, side, seed)
    scores.add_shares(score(truth, captions), n, "reader")
    decoded = pipeline.decode(pipeline.encode(truth))
    scores.add_shares(score(decoded, captions), n, "reconstructed")
    scores.add(from_drawings(decoded, captions), "drawing", "reconstructed")
    generated = {}
    for name, unseen in sets.items():
        asked = make_shapes(n, side, seed, unseen)[1]
        prompts = [prompt_of(caption) for caption in asked]
        generated[name] = generated_of(prompts)
        scores.add_shares(score(generated[name], prompts), n, name)
        if prompts == asked:  # a class alone leaves colours and place open
            scores.add(from_drawings(generated[name], prompts), "drawing", name)
    return generated["seen"]  # the held-out pairs are meant to differ from all that was trained on


def from_drawings(images: np.ndarray, captions: Sequence[str]) -> tuple[float, float]:
    """Compute the median distance of images from the nearest true drawings of their captions.

    → it, and its standard error.
    """
    some = range(min(len(images), DRAWN))
    drawn = [drawing_distance(images[i], Attributes.parse(captions[i])) for i in some]
    return jackknife(np.median, np.array(drawn))


def _score_task(pipeline, generated_of, count, true, shapes, scores):
    """Score a model with a task, conditioned on real images."""
    truth = true.pick([i % len(true) for i in range(count)])
    scene = task_input(pipeline.task, truth, shapes is not None)
    generated = generated_of(truth.captions, scene)
    scores.values["task"] = {"name": pipeline.task}
    for name, measured in compare(scene, generated, truth.images).items():
        scores.add(measured, "task", name)
    if shapes:
        decoded = pipeline.decode(pipeline.encode(truth.images))
        for name, images in (
            ("reader", truth.images), ("reconstructed", decoded), ("seen", generated)
        ):  # fmt: skip
            scores.add_shares(score(images, truth.captions), len(truth), name)
    return generated


def _generate(pipeline, prompts, scene, bar, seed, **options) -> np.ndarray:
    generated = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        some = scene and scene.pick(part)
        generated.append(generate(pipeline, prompts[part], some, seed=seed + start, **options))
        bar.update(len(prompts[part]))
    return np.concatenate(generated)


def _compare(features, generated, training, held_out, rng, scores):
    """Compare generated with real images; → those nearest to training images, and the latter."""
    at, distance = nearest_images(generated, training.images)
    scores.add(jackknife(np.median, distance), "nearest", "generated")
    if len(held_out) > 1:
        _, real_distance = nearest_images(held_out.images, training.images)
        scores.add(jackknife(np.median, real_distance), "nearest", "held_out")
        if len(held_out) >= FEWEST_FOR_COPIES:
            share = copied(distance, real_distance)
            scores.add((share, share_error(share, len(distance))), "nearest", "copied")
    n = min(len(generated), len(held_out)) if len(held_out) > 1 else len(generated)
    some = training.pick(np.linspace(0, len(training) - 1, min(len(training), 2048)).astype(int))
    real = features(some.images)
    others = _drawn(held_out, n, rng).images
    for name, images in (("generated", generated[:n]), ("held_out", others)):
        made = features(images) if len(images) else real[:0]  # equally many, to compare
        if min(len(made), len(real)) > 1:  # one image has no covariance
            measured = jackknife(lambda some: frechet_distance(some, real), made)
            scores.add(measured, "frechet", name)
            scores.add(jackknife(lambda some: kernel_distance(some, real), made), "kernel", name)
        if min(len(made), len(real)) > NEIGHBOURS:
            values, errors = jackknife(lambda some: precision_recall(some, real, NEIGHBOURS), made)
            for key, value, error in zip(("precision", "recall"), values, errors, strict=True):
                scores.add((value, error), key, name)
    closest = np.argsort(distance, kind="stable")[:12]
    return {"samples": generated[closest], "nearest": training.images[at[closest]]}


def latent_features(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Features (n, d) of images: the first stage's latents, averaged over a coarse grid."""
    latents = to_device(pipeline.encode(images), "cpu")
    n, h, w, c = latents.shape
    rows, columns = (np.array_split(np.arange(side), min(side, CELLS)) for side in (h, w))
    cells = [latents[:, r][:, :, q].mean(axis=(1, 2)) for r in rows for q in columns]
    return np.concatenate(cells, axis=1).astype(np.float64)
