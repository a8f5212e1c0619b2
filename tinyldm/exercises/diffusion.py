"""Exercises on diffusion: noise, samplers, guidance. Identities and Gaussian data judge them."""

import math

import numpy as np

from tinyldm.diffusion.schedule import Schedule, posterior
from tinyldm.diffusion.timesteps import timesteps
from tinyldm.exercises.exercise import Exercise, same
from tinyldm.testing import check_sampler
from tinyldm.testing.tensors import tensors_of

DIFFUSION = "tinyldm.diffusion"
V = {"prediction_type": "v_prediction"}


def _add_noise(f):
    schedule, t = Schedule({}), np.array([0, 300, 999])
    x0, noise = tensors_of("n 2 2 1", "n 2 2 1", n=3)
    alphas_bar = schedule.alphas_bar[t].reshape(3, 1, 1, 1)
    same(f(schedule, x0, 0 * noise, t), np.sqrt(alphas_bar) * x0, "without noise, x_t")
    same(f(schedule, 0 * x0, noise, t), np.sqrt(1 - alphas_bar) * noise, "of a black image, x_t")


def _split(f):
    schedule, alpha_bar = Schedule(V), 0.3
    x0, noise = tensors_of("n", "n", n=4)
    a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    x, v = a * x0 + s * noise, a * noise - s * x0
    found = f(schedule, v, x, alpha_bar)
    same(found[0], x0, f"x_0, with a = {a:.4f} and s = {s:.4f}")
    same(found[1], noise, f"ε, with a = {a:.4f} and s = {s:.4f}")


def _posterior(f):
    for alpha_bar, before in ((0.2, 0.5), (0.5, 0.51), (0.001, 0.9)):
        x0_weight, xt_weight, variance = f(alpha_bar, before)
        same(
            x0_weight + xt_weight * math.sqrt(alpha_bar),
            math.sqrt(before),
            f"ᾱ {alpha_bar}, before {before}: what is left of x_0 in the mean, √ᾱ of before",
        )
        same(
            xt_weight**2 * (1 - alpha_bar) + variance,
            1 - before,
            f"ᾱ {alpha_bar}, before {before}: the variance of noise, 1 − ᾱ of before",
        )


def _ddim(f):
    schedule = Schedule({"clip_sample": False})
    before, after = schedule.alphas_bar[timesteps(schedule, 10)[:2]]
    x0, epsilon = tensors_of("n 2", "n 2", n=3)
    x = math.sqrt(before) * x0 + math.sqrt(1 - before) * epsilon
    for eta, what in ((0.0, "x after a step"), (1.0, "η = 1: x before its fresh noise")):
        found, _ = next(f(lambda x, t: epsilon, schedule, x, 10, eta, lambda: 0 * epsilon))
        rest = 1 - after - eta**2 * posterior(before, after)[2]
        expected = math.sqrt(after) * x0 + math.sqrt(rest) * epsilon
        same(found, expected, f"{what}, with next_alpha_bar = {after:.4f} and rest = {rest:.4f}")

    def sampler(predict, x, steps):
        *_, (x, _) = f(lambda x, t: predict(x, int(t)), schedule, x, steps)
        return x

    check_sampler(sampler, schedule.alphas_bar, order=1)


def _guided(f):
    without, with_text = tensors_of("2 3 3 1", "2 3 3 1")

    def predict(x, t):
        return np.concatenate([without, with_text])

    def at(guidance):
        return f(predict, guidance)(without, 0)

    same(at(1.0), with_text, "guidance 1 is the prediction with the prompt")
    same(at(0.0), without, "guidance 0 is the prediction without it")
    same(at(3.0), 3 * with_text - 2 * without, "guidance 3")


def _min_snr(f):
    t = np.array([0, 200, 500, 999])
    for prediction, in_prediction in (("sample", 1.0), ("epsilon", 0.0), ("v_prediction", 1.0)):
        schedule = Schedule({"prediction_type": prediction})
        snr = schedule.snr(t)
        divisor = 1.0 if prediction == "sample" else snr + in_prediction
        same(f(schedule, t), np.minimum(snr, 5) / divisor, f"{prediction}: the weights at t = {t}")


EXERCISES = (
    Exercise(
        "a step into noise",
        "x_t = a x_0 + s ε, with a = √ᾱ and s = √(1 − ᾱ): the whole forward process in one line. a "
        "and s are there already, of the shape that multiplies an image.",
        f"{DIFFUSION}.schedule", "Schedule.add_noise", "return",
        ("a is for the image, s for the noise; a² + s² = 1 keeps the variance.",),
        _add_noise,
    ),
    Exercise(
        "back from v",
        "A network predicts v = a ε − s x_0 at x = a x_0 + s ε, with a² + s² = 1. Return x_0 and "
        "ε.",
        f"{DIFFUSION}.schedule", "Schedule.split", "return",
        (
            "(x, v) is (x_0, ε), turned by an angle whose cosine is a: turn it back.",
            "Multiply x by a and v by s, and subtract: what is left of ε?",
            "For ε, multiply x by s and v by a, and add.",
        ),
        _split,
    ),
    Exercise(
        "what DDPM's step keeps",
        "The posterior q(x_r | x_t, x_0) has the mean x0_weight x_0 + xt_weight x_t. x0_weight is "
        "there. "
        "Write xt_weight: what is left of x_0 in the mean must be √ᾱ of r, since x_t holds √ᾱ x_0.",
        f"{DIFFUSION}.schedule", "posterior", "xt_weight",
        (
            "Ho et al. 2020, eq. 7: √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t).",
            "α between the two steps is ᾱ / ᾱ_r.",
        ),
        _posterior,
    ),
    Exercise(
        "a step of DDIM",
        "From x_0 and ε as they are predicted, put the next x together, which has the level "
        "next_alpha_bar. `rest` is the variance of the noise that is kept of ε.",
        f"{DIFFUSION}.samplers", "ddim", "x",
        (
            "It is the forward process again, with the predicted ε in the place of fresh noise.",
            "√next_alpha_bar x_0 + √rest ε.",
        ),
        _ddim,
        which=0,
    ),
    Exercise(
        "guidance",
        "The network has predicted noise `without` and `with_text`. Go from the first towards the "
        "second, `guidance` times as far.",
        f"{DIFFUSION}.guidance", "guided", "predict_guided/prediction",
        (
            "At guidance 1 it is with_text, at 0 it is without.",
            "Above 1 it goes on along the same line: an extrapolation.",
        ),
        _guided,
        which=0,
    ),
    Exercise(
        "losses that count alike",
        "Min-SNR weights the loss in x_0 by min(SNR, γ). The network is trained on another "
        "prediction, "
        "whose loss is _per_x0(schedule, t) times that in x_0. Return the weight of its loss.",
        f"{DIFFUSION}.loss", "min_snr", "return",
        (
            "weight · loss = min(SNR, γ) · loss in x_0.",
            "schedule.snr(t) is the SNR; np.minimum works on each of the steps.",
        ),
        _min_snr,
    ),
)  # fmt: skip
