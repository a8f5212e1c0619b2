"""Samplers on data whose exact denoiser is a formula, so that the right answer is known.

Where the data are normal, N(μ, s²), the denoiser is linear in x, every step of a sampler is an
affine map, and mean and spread of the samples follow without drawing any. Where they are a single
point, s = 0, the denoiser says exactly which noise was added.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.diffusion.guidance import guided
from tinyldm.diffusion.samplers import SAMPLERS, ddim, ddpm, pndm
from tinyldm.diffusion.schedule import PREDICTIONS, Schedule
from tinyldm.diffusion.timesteps import timesteps

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
DDPM = {"clip_sample": False}
COSINE = {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}
SPACINGS = ("leading", "trailing", "linspace")
COUNTS = (1, 2, 3, 7, 30, 300, 600, 999, 1000)
MEAN, SPREAD = 0.7, 0.5  # of the data


def no_noise():
    raise AssertionError("noise was asked for")


def denoiser(schedule, mean=MEAN, spread=SPREAD):
    """What a perfect network predicts at x_t for data from N(mean, spread²)."""

    def predict(x, t):
        a, s = math.sqrt(schedule.alphas_bar[t]), math.sqrt(1 - schedule.alphas_bar[t])
        surprise = (x - a * mean) / (a**2 * spread**2 + s**2)
        x0, noise = mean + a * spread**2 * surprise, s * surprise
        return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0}[
            schedule.prediction
        ]

    return predict


def sample(sampler, schedule, x, steps, mean=MEAN, spread=SPREAD, **options):
    """The last x of a sampler with a perfect network."""
    *_, (y, _) = sampler(denoiser(schedule, mean, spread), schedule, x, steps, **options)
    return y


def moments(sampler, schedule, steps, **options):
    """Mean and standard deviation of the samples, from the sampler's own affine map.

    The map is read off from its values where all noise is zero and where one number of it is one:
    column 0 and the others, of which column 1 is the start noise.
    """
    draws = iter(np.eye(steps + 2)[2:])
    x = np.eye(steps + 2)[1]
    y = sample(sampler, schedule, x, steps, noise=lambda: next(draws), **options)
    return y[0], math.sqrt(((y[1:] - y[0]) ** 2).sum())


# --------------------------------------------------------------------------------------- time steps


@pytest.mark.parametrize("total", [1, 2, 7, 1000])
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_count_of_steps_falls_through_the_trained_ones(spacing, offset, total):
    schedule = Schedule(
        {"num_train_timesteps": total, "timestep_spacing": spacing, "steps_offset": offset}
    )
    for steps in range(1, total + 1):
        t = timesteps(schedule, steps)
        assert t.shape == (steps,) and t.dtype == np.int64
        assert t.min() >= 0 and t.max() < total
        # An offset may lead past the last trained step; that one is then taken more than once.
        again = t[1:] == total - 1
        assert ((np.diff(t) < 0) | again).all()
        assert again.sum() <= (offset if spacing == "leading" else 0)


def spaced(spacing, steps, **others):
    return timesteps(Schedule({"timestep_spacing": spacing} | others), steps).tolist()


def test_leading_steps():
    assert timesteps(Schedule(STABLE_DIFFUSION), 50).tolist() == list(range(981, 0, -20))
    assert timesteps(Schedule({}), 4).tolist() == [750, 500, 250, 0]  # as when nothing is said
    assert spaced("leading", 3) == [666, 333, 0]
    assert spaced("leading", 600, steps_offset=1) == list(range(600, 0, -1))
    assert spaced("leading", 1000) == list(range(999, -1, -1))
    assert spaced("leading", 1000, steps_offset=1) == [999, *range(999, 0, -1)]


def test_trailing_steps():
    assert spaced("trailing", 1) == [999]
    assert spaced("trailing", 3) == [999, 666, 332]
    assert spaced("trailing", 50) == list(range(999, 18, -20))
    assert spaced("trailing", 1000) == list(range(999, -1, -1))


def test_evenly_spaced_steps():
    assert spaced("linspace", 2) == [999, 0]
    assert spaced("linspace", 4) == [999, 666, 333, 0]
    assert spaced("linspace", 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_counts_are_refused(steps):
    with pytest.raises(ValueError, match=rf"^steps: expected 1…1000, found {steps}$"):
        timesteps(Schedule({}), steps)


# --------------------------------------------------------------------------------------- trajectory


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_count_of_steps_runs(spacing, name, steps):
    schedule = Schedule(STABLE_DIFFUSION | {"timestep_spacing": spacing})
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 2, 2, 1))
    asked = []

    def predict(x, t):
        asked.append(t)
        return denoiser(schedule)(x, t)

    options = {"noise": lambda: rng.normal(size=x.shape)} if name == "ddpm" else {}
    pairs = list(SAMPLERS[name](predict, schedule, x, steps, **options))
    assert len(pairs) == steps
    assert asked == timesteps(schedule, steps).tolist()
    assert np.isfinite(pairs).all() and np.shape(pairs) == (steps, 2, *x.shape)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "options", [{"sampler": ddim}, {"sampler": ddim, "eta": 1}, {"sampler": ddpm}]
)
def test_yields_where_it_stands_and_the_image_ahead(prediction, options):
    """With one point of data the image ahead is that point, and the last x is there too."""
    schedule = Schedule(DDPM | {"prediction_type": prediction})
    rng = np.random.default_rng(0)
    x = rng.normal(size=5)
    options = {"noise": lambda: rng.normal(size=5)} | options
    sampler = options.pop("sampler")
    pairs = list(sampler(denoiser(schedule, MEAN, 0), schedule, x, 20, **options))
    np.testing.assert_allclose([x0 for _, x0 in pairs], np.full((20, 5), MEAN), atol=1e-12)
    np.testing.assert_allclose(pairs[-1][0], np.full(5, MEAN), atol=1e-12)
    assert abs(pairs[-2][0] - MEAN).min() > 1e-4


@pytest.mark.parametrize(
    "options", [{"sampler": ddim}, {"sampler": ddim, "eta": 1}, {"sampler": ddpm}]
)
def test_start_noise_is_not_written_to_and_float32_stays_float32(options):
    """Tables are float64, but a step must not lift the latents, and all that follows, to it."""
    schedule = Schedule(DDPM)
    x = np.random.default_rng(0).normal(size=5).astype("float32")
    before = x.copy()
    options = {"noise": lambda: np.ones_like(x)} | options
    sampler = options.pop("sampler")
    pairs = list(sampler(lambda x, t: 0.1 * x, schedule, x, 4, **options))
    np.testing.assert_array_equal(x, before)
    assert {array.dtype for pair in pairs for array in pair} == {np.dtype("float32")}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_clipping_holds_the_image_in_range(name, prediction):
    def images(**config):
        schedule = Schedule({"prediction_type": prediction} | config)
        x = np.array([-30.0, 0.1, 30.0])
        steps = SAMPLERS[name](lambda x, t: -5 * x, schedule, x, 5, noise=lambda: np.ones(3))
        return np.array([x0 for _, x0 in steps])

    assert abs(images(clip_sample=False)).max() > 10
    assert abs(images()).max() == 1  # as when nothing is said
    assert abs(images(clip_sample=True, clip_sample_range=2.5)).max() == 2.5


def test_clipping_leaves_the_predicted_noise_alone():
    schedule = Schedule({"clip_sample": True})
    x, noise = np.array([3.0]), np.array([-0.5])
    t, then = timesteps(schedule, 2)
    y, x0 = next(ddim(lambda x, t: noise, schedule, x, 2))
    a, s = math.sqrt(schedule.alphas_bar[then]), math.sqrt(1 - schedule.alphas_bar[then])
    assert x0 == 1
    np.testing.assert_allclose(y, a * 1 + s * noise, rtol=1e-13)


# --------------------------------------------------------------------------------------------- DDIM


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", COUNTS)
def test_one_point_of_data_is_reached_exactly(steps, spacing, prediction):
    """The way there is a straight line, whatever the steps: x_t = a μ + s ε with one ε for all."""
    schedule = Schedule(COSINE | {"timestep_spacing": spacing, "prediction_type": prediction})
    noise = np.array([-2.0, 0.0, 0.3, 1.5])
    alphas_bar = np.append(schedule.alphas_bar[timesteps(schedule, steps)], 1.0)[:, None]
    line = np.sqrt(alphas_bar) * MEAN + np.sqrt(1 - alphas_bar) * noise
    pairs = np.array(list(ddim(denoiser(schedule, MEAN, 0), schedule, line[0], steps)))
    assert abs(pairs[:, 0] - line[1:]).max() <= 1e-10
    assert abs(pairs[:, 1] - MEAN).max() <= 1e-10
    assert abs(pairs[-1, 0] - MEAN).max() <= 1e-10


def test_the_last_step_leads_to_no_noise_or_to_the_least_trained():
    noise = np.array([1.5])
    for set_alpha_to_one in (True, False):
        schedule = Schedule(STABLE_DIFFUSION | {"set_alpha_to_one": set_alpha_to_one})
        a, s = (np.sqrt(y[981]) for y in (schedule.alphas_bar, 1 - schedule.alphas_bar))
        y = sample(ddim, schedule, a * MEAN + s * noise, 50, MEAN, 0)
        end = 1.0 if set_alpha_to_one else schedule.alphas_bar[0]
        expected = math.sqrt(end) * MEAN + math.sqrt(1 - end) * noise
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10)


def probability_flow(x, now, then):
    """Where the ordinary differential equation of the normal data leads, exactly.

    In x / a, with σ = s / a as time, all quantiles of N(μ, s² + σ²) move with its spread.
    """
    spread = [math.sqrt(SPREAD**2 + 1 / alpha_bar - 1) for alpha_bar in (now, then)]
    return math.sqrt(then) * (MEAN + (x / math.sqrt(now) - MEAN) * spread[1] / spread[0])


def order(config, counts, prediction, sampler=ddim):
    """The power of 1 / steps with which the error falls, fitted over `counts`."""
    schedule = Schedule(config | {"prediction_type": prediction})
    errors = []
    for steps in counts:
        start = schedule.alphas_bar[timesteps(schedule, steps)[0]]
        end = 1.0 if config.get("set_alpha_to_one", True) else schedule.alphas_bar[0]
        y = sample(sampler, schedule, np.array([1.3]), steps)
        errors.append(abs(y[0] - probability_flow(1.3, start, end)))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


# Counts that divide the number of trained steps, so that all grids are even.
FINE, FINE_COUNTS = 5120, np.array([160, 320, 640, 1280])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "spacing, set_alpha_to_one",
    [
        ("leading", True), ("leading", False), ("trailing", True), ("trailing", False),
        ("linspace", False),  # which ends at 0: a step on to ᾱ = 1 would be out of line
    ],
)  # fmt: skip
def test_error_falls_with_the_number_of_steps(spacing, set_alpha_to_one, prediction):
    """Order 1.00. A step paired with the wrong neighbour leaves an error that does not fall."""
    both_ends = spacing == "linspace"
    config = {
        "num_train_timesteps": FINE + both_ends, "beta_start": 1e-8, "beta_end": 20 / FINE,
        "clip_sample": False, "timestep_spacing": spacing, "set_alpha_to_one": set_alpha_to_one,
    }  # fmt: skip
    assert abs(order(config, FINE_COUNTS + both_ends, prediction) - 1) < 0.01


@pytest.mark.parametrize("kind", [{"beta_start": 0.1 / FINE, "beta_end": 20 / FINE}, COSINE])
def test_error_falls_on_the_usual_schedules(kind):
    """Not quite order 1: they start with a jump in σ, like √t, that no grid makes small."""
    config = DDPM | {"num_train_timesteps": FINE, "timestep_spacing": "trailing"} | kind
    assert abs(order(config, FINE_COUNTS, "epsilon") - 1) < 0.05


@pytest.mark.parametrize("noise", [None, no_noise])
def test_ddim_without_eta_is_deterministic(noise):
    schedule = Schedule(STABLE_DIFFUSION)
    x = np.array([0.3, -1.0])
    y = sample(ddim, schedule, x, 50, eta=0.0, noise=noise)
    np.testing.assert_array_equal(y, sample(ddim, schedule, x, 50))


# --------------------------------------------------------------------------------------------- DDPM


def pushed_through(schedule, steps):
    """Mean and standard deviation of DDPM's samples, by recursion from N(0, 1)."""
    alphas_bar = [*schedule.alphas_bar[timesteps(schedule, steps)].tolist(), 1.0]
    mean, variance = 0.0, 1.0
    for now, then in itertools.pairwise(alphas_bar):
        alpha, beta = now / then, 1 - now / then
        # E[x_0 | x] = MEAN + gain (x − a MEAN), then the mean of q(x_s | x_t, x_0) at it.
        gain = math.sqrt(now) * SPREAD**2 / (now * SPREAD**2 + 1 - now)
        x0_weight = math.sqrt(then) * beta / (1 - now)
        slope = x0_weight * gain + math.sqrt(alpha) * (1 - then) / (1 - now)
        mean = slope * mean + x0_weight * (1 - gain * math.sqrt(now)) * MEAN
        variance = slope**2 * variance + beta * (1 - then) / (1 - now)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 300, 1000])
def test_mean_and_spread_of_ddpm(steps, spacing, prediction):
    schedule = Schedule(DDPM | {"timestep_spacing": spacing, "prediction_type": prediction})
    found, expected = moments(ddpm, schedule, steps), pushed_through(schedule, steps)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_known_numbers_of_ddpm():
    """From an independent computation: T = 1000, β from 1e-4 to 0.02, data N(0.7, 0.5²)."""
    found = moments(ddpm, Schedule(DDPM), 1000)
    np.testing.assert_allclose(found, [0.6999929370838904, 0.49611007988175687], rtol=1e-12)
    found = moments(ddpm, Schedule(DDPM | {"variance_type": "fixed_large"}), 1000)
    np.testing.assert_allclose(found, [0.6999929370838904, 0.5007515102397233], rtol=1e-12)


def test_noise_is_drawn_for_each_step_but_the_last():
    for sampler, options in ((ddpm, {}), (ddim, {"eta": 0.5})):
        draws = []

        def noise(draws=draws):
            draws.append(1)
            return np.ones(1)

        sample(sampler, Schedule(DDPM), np.ones(1), 20, noise=noise, **options)
        assert len(draws) == 19


@given(seed=st.integers(0, 2**32 - 1), steps=st.sampled_from([1, 2, 7, 50, 1000]))
def test_ddim_with_eta_one_is_ddpm(seed, steps):
    """Step by step and on any network, not only in law."""
    schedule = Schedule(DDPM)
    x, *noises = np.random.default_rng(seed).normal(size=(steps + 1, 3))
    runs = [
        sampler(lambda x, t: np.sin(x + t), schedule, x, steps, noise=iter(noises).__next__, **eta)
        for sampler, eta in ((ddim, {"eta": 1.0}), (ddpm, {}))
    ]
    found, expected = (np.array(list(run)) for run in runs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * abs(expected).max())


def test_spread_of_ddim_rises_with_eta_to_that_of_ddpm():
    schedule = Schedule(DDPM)
    _, spread = moments(ddim, schedule, 1000, eta=1.0)
    np.testing.assert_allclose(spread, 0.49611007988175687, rtol=1e-12)
    one_step = []
    for eta in (0.0, 0.5, 1.0):
        with_noise, without = (
            next(ddim(denoiser(schedule), schedule, np.ones(1), 5, eta, lambda z=z: np.full(1, z)))
            for z in (1.0, 0.0)
        )
        one_step.append((with_noise[0] - without[0])[0])
    np.testing.assert_allclose(one_step, np.array([0, 0.5, 1]) * one_step[2], rtol=1e-12)
    assert one_step[2] > 0.1


# --------------------------------------------------------------------------------------------- PNDM


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 30, 300, 999, 1000])
def test_pndm_reaches_one_point_of_data_exactly(steps, skip, spacing, prediction):
    """All predictions along the way stand for the same noise, so all mixtures of them do."""
    schedule = Schedule(
        DDPM
        | {"timestep_spacing": spacing, "prediction_type": prediction, "set_alpha_to_one": True}
        | {"skip_prk_steps": skip}
    )
    noise = np.array([-2.0, 0.0, 0.3, 1.5])
    alpha_bar = schedule.alphas_bar[timesteps(schedule, steps)[0]]
    start = math.sqrt(alpha_bar) * MEAN + math.sqrt(1 - alpha_bar) * noise
    pairs = np.array(list(pndm(denoiser(schedule, MEAN, 0), schedule, start, steps)))
    assert len(pairs) == steps
    if prediction == "epsilon":  # the others mix predictions at different times
        assert abs(pairs[:, 1] - MEAN).max() <= 1e-8
        np.testing.assert_allclose(pairs[-1, 0], np.full(4, MEAN), atol=1e-9)
    assert np.isfinite(pairs).all()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_error_of_pndm_falls_at_least_with_the_square_of_the_number_of_steps(spacing, skip):
    both_ends = spacing == "linspace"
    config = {
        "num_train_timesteps": FINE + both_ends, "beta_start": 1e-8, "beta_end": 20 / FINE,
        "timestep_spacing": spacing, "set_alpha_to_one": False, "skip_prk_steps": skip,
    }  # fmt: skip
    assert order(config, np.array([80, 160, 320]) + both_ends, "epsilon", pndm) > 2


@pytest.mark.parametrize("skip, calls", [(True, 21), (False, 29)])
def test_predictions_of_pndm(skip, calls):
    asked = []
    schedule = Schedule(DDPM | {"skip_prk_steps": skip})
    list(pndm(lambda x, t: asked.append(t) or x, schedule, np.ones(1), 20))
    assert len(asked) == calls
    if skip:
        assert asked == [950, 900, 900, *range(850, -1, -50)]
    else:
        assert asked[:8] == [950, 925, 925, 900, 900, 875, 875, 850]


# ------------------------------------------------------------------------------------ every sampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_asked_for_by_those_that_are_random(name):
    draws = []

    def noise():
        draws.append(1)
        return np.ones(2, "float32")

    options = {"noise": noise} if SAMPLERS[name].needs_noise else {}
    x = np.ones(2, "float32")
    schedule = Schedule(STABLE_DIFFUSION)
    pairs = list(SAMPLERS[name](lambda x, t: 0.1 * x, schedule, x, 20, **options))
    assert len(pairs) == 20 and len(draws) == (19 if SAMPLERS[name].needs_noise else 0)
    assert {array.dtype for pair in pairs for array in pair} == {np.dtype("float32")}
    assert (x == 1).all()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_every_sampler_refuses_impossible_counts(name, steps):
    options = {"noise": no_noise} if SAMPLERS[name].needs_noise else {}
    with pytest.raises(ValueError, match=rf"^steps: expected 1…1000, found {steps}$"):
        next(SAMPLERS[name](lambda x, t: x, Schedule({}), np.ones(1), steps, **options))


# ----------------------------------------------------------------------------------------- guidance


def network(context, batches=None):
    """A network with a context for each sample, that notes the sizes of its batches."""

    def predict(x, t):
        if batches is not None:
            batches.append(len(x))
        return np.cos(x * (1 + t)) + context.sum((1, 2))[:, None] * x**2

    return predict


TEXT, NULL = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
BOTH = np.concatenate([NULL, TEXT])
X = np.random.default_rng(1).normal(size=(3, 6))


def test_guidance_zero_is_unconditional():
    np.testing.assert_array_equal(guided(network(BOTH), 0.0)(X, 7), network(NULL)(X, 7))


@given(guidance=st.floats(-20, 20))
def test_guidance_is_affine_and_equals_two_calls(guidance):
    batches = []
    found = guided(network(BOTH, batches), guidance)(X, 7)
    assert batches == [2 * len(X)]
    with_text, without = (network(context)(X, 7) for context in (TEXT, NULL))
    expected = (1 - guidance) * without + guidance * with_text
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * abs(expected).max())


@given(guidance=st.floats(-20, 20))
def test_guidance_changes_nothing_where_both_agree(guidance):
    found = guided(network(np.concatenate([TEXT, TEXT])), guidance)(X, 7)
    np.testing.assert_array_equal(found, network(TEXT)(X, 7))


def test_guidance_keeps_float32():
    assert guided(network(BOTH.astype("float32")), 7.5)(X.astype("float32"), 7).dtype == np.float32


@given(guidance=st.floats(1.5, 20), rescale=st.floats(0, 1))
def test_rescaled_guidance_has_the_spread_of_the_prediction_with_text(guidance, rescale):
    """Wholly at 1, and in between in proportion; a sample at a time."""
    plain, with_text = guided(network(BOTH), guidance)(X, 7), network(TEXT)(X, 7)
    found = guided(network(BOTH), guidance, rescale)(X, 7)
    spread = rescale * with_text.std(axis=1) + (1 - rescale) * plain.std(axis=1)
    np.testing.assert_allclose(found.std(axis=1), spread, rtol=1e-9)
    np.testing.assert_allclose(found, plain * (spread / plain.std(axis=1))[:, None], rtol=1e-9)


def test_guided_sampling_from_start_to_end():
    """Text that moves the mean of the data moves the samples by `guidance` times as much."""
    schedule = Schedule(DDPM)

    def predict(x, t):
        return np.stack(
            [denoiser(schedule, mean, 0)(x[i], t) for i, mean in enumerate((-1.0, 1.0))]
        )

    x = np.zeros((1, 2))
    for guidance in (0, 0.5, 1, 3):
        *_, (y, _) = ddim(guided(predict, guidance), schedule, x, 10)
        np.testing.assert_allclose(y, -1 + 2 * guidance, atol=1e-10)
