"""Chapters on latents: the noise schedule, what latents are, and copies of training images."""

import numpy as np

from tinyldm.backend import to_device
from tinyldm.data.images import from_uint8, in_channels, to_uint8
from tinyldm.evaluation.figures import latents_as_images
from tinyldm.evaluation.metrics import FEWEST_FOR_COPIES
from tinyldm.evaluation.plots import Curves
from tinyldm.evaluation.reverse import start_noise
from tinyldm.evaluation.statistics import TAIL, copied, nearest_images, share_error
from tinyldm.explain.subject import Contents, Subject
from tinyldm.sampling.noise import slerp

NOISE_STEPS = 26  # that the slider of the schedule visits
CODED = 6  # images whose latents are shown
MOST, FEW = 256, 32  # images whose latents are counted, and whose distributions are
BINS = np.linspace(-4, 4, 41)
BETWEEN = 13  # images from one noise to another
COPIES = 48  # images that are generated to look for copies
SHOWN = 8  # pairs


def schedule(subject: Subject, contents: Contents) -> None:
    """Show the forward process of one image, and the schedule's signal-to-noise ratio."""
    pipeline = subject.pipeline
    rule, image = pipeline.schedule, subject.training.images[:1]
    equal = int(np.abs(np.log(np.maximum(rule.snr(np.arange(len(rule))), 1e-12))).argmin())
    t = np.linspace(0, len(rule) - 1, NOISE_STEPS).round().astype(int)
    t = np.unique([*t, equal])  # where there is as much noise as image, too
    rng = np.random.default_rng(0)

    def noisy(x0):
        noise = rng.standard_normal(x0.shape, dtype=np.float32)
        return np.concatenate([rule.add_noise(x0, noise, [step]) for step in t])

    pixels = noisy(in_channels(from_uint8(image), pipeline.vae.config.in_channels))
    latents = noisy(to_device(pipeline.encode(image), "cpu"))
    decoded = pipeline.decode(pipeline.xp.asarray(latents))
    contents.sheet("schedule-pixels", to_uint8(pixels)[None])
    contents.sheet("schedule-latents", latents_as_images(latents)[None])
    contents.sheet("schedule-decoded", decoded[None])
    contents.text("schedule-t", [f"t = {step}" for step in t])
    snr = rule.snr(t)
    said = []
    for step, ratio in zip(t, snr, strict=True):
        share = rule.alphas_bar[step]
        against = f"{ratio:,.3g} : 1" if ratio >= 1 else f"1 : {1 / max(ratio, 1e-9):,.3g}"
        said.append(
            f"a² = {share:.2g} of the variance is image, s² = {1 - share:.2g} is noise: {against}"
        )
    contents.text("schedule-share", said)
    every = np.arange(0, len(rule), 5)
    ratios = rule.snr(every)
    curves = {"this run's": (every.tolist(), ratios.tolist())}
    marks = [(equal, f"as much noise as image: t = {equal}")]
    title = "how much of the image is left"
    contents.plot("schedule", Curves(curves, title, "time step t", "signal to noise", marks=marks))


def latents(subject: Subject, contents: Contents) -> None:
    """Show the latents' channels, their histogram, a way between two noises, and random latents."""
    pipeline, images = subject.pipeline, subject.training.images
    z = to_device(pipeline.encode(images[:MOST]), "cpu")
    some = z[:CODED]
    channels = to_uint8(np.clip(some / 3, -1, 1)).transpose(0, 3, 1, 2)
    contents.sheet("latents-channels", np.stack([channels] * 3, axis=-1))
    contents.sheet("latents-images", images[:CODED][:, None])
    back = pipeline.decode(pipeline.xp.asarray(some))
    contents.sheet("latents-decoded", back[:, None])
    contents.text("latents-captions", [c or "an image" for c in subject.training.captions[:CODED]])
    spread = ", ".join(f"{std:.2f}" for std in z.std(axis=(0, 1, 2)))
    scale = pipeline.vae.config.scaling_factor
    said = f"This model's factor is {scale:.4g}. With it the channels have standard deviations of "
    contents.text("latents-scale", [f"{said}{spread}. {_own_noise(pipeline, images[:FEW])}"])
    contents.text("latents-channel-names", [f"channel {i}" for i in range(z.shape[3])])
    middles = ((BINS[1:] + BINS[:-1]) / 2).tolist()
    density = {
        f"channel {i}": (middles, np.histogram(z[..., i], BINS, density=True)[0].tolist())
        for i in range(z.shape[3])
    }
    normal = np.exp(-np.square(middles) / 2) / np.sqrt(2 * np.pi)
    density["N(0, 1)"] = (middles, normal.tolist())
    title = f"latents of {len(z)} training images"
    contents.plot("latents", Curves(density, title, "value, scaled", "density", logarithmic=False))

    start = to_device(start_noise(pipeline, 2), "cpu")
    ways = [slerp(start[:1], start[1:], amount) for amount in np.linspace(0, 1, BETWEEN)]
    made = pipeline([subject.prompts[0]] * BETWEEN, latents=np.concatenate(ways))
    contents.sheet("latents-way", np.stack([np.asarray(image) for image in made])[None])
    contents.text("latents-way", [f"{i / (BETWEEN - 1):.0%} of the way" for i in range(BETWEEN)])
    contents.sheet("latents-random", pipeline.decode(start_noise(pipeline, CODED))[:, None])


def _own_noise(pipeline, images):
    """Say how much of the latents' variance is the encoder's own noise, where it has any."""
    pixels = in_channels(from_uint8(images), pipeline.vae.config.in_channels)
    on_device = pipeline.xp.asarray(pixels)
    mean, std = pipeline.vae.latent_distribution(pipeline.params["vae"], on_device)
    if std is None:
        return ""
    noise = float((std**2).mean())
    share = noise / (noise + float(mean.var()))
    return f"They are means: the encoder draws around them, {share:.0%} of the whole variance."


def copies(subject: Subject, contents: Contents) -> None:
    """Show generated images beside the training images nearest to them."""
    captions = list(dict.fromkeys(subject.training.captions))[:COPIES]
    prompts = (captions * COPIES)[:COPIES]
    made = np.stack([np.asarray(image) for image in subject.pipeline(prompts, seed=1)])
    at, distance = nearest_images(made, subject.training.images)
    order = np.argsort(distance, kind="stable")[:SHOWN]
    contents.sheet("copies-generated", made[order][:, None])
    contents.sheet("copies-nearest", subject.training.images[at[order]][:, None])
    contents.text("copies-distance", [f"{distance[i]:.1f} of 255" for i in order])
    contents.text("copies-prompts", [prompts[i] or "(no caption)" for i in order])
    said = "Too few images were held out to say how near is near."
    if len(subject.held_out) >= FEWEST_FOR_COPIES:
        _, real = nearest_images(subject.held_out.images, subject.training.images)
        share = copied(distance, real)
        error = share_error(share, COPIES)
        end = "some are copies" if share - 2 * error > TAIL else "there is no sign of copies"
        said = (
            f"{share:.0%} ± {error:.0%} of {COPIES} generated images are nearer to a training image"
            f" than 95 % of the held-out images are. 5 % is chance, so {end}."
        )
    contents.text("copies-verdict", [said])
