"""The solvers in σ, on data whose exact denoiser is a formula.

Where the data are N(μ, s²), the equation is solved by x − μ = c √(s² + σ²), in x / a.
"""

import math

import numpy as np
import pytest
from scipy import special

from tinyldm.config import ConfigError
from tinyldm.diffusion.samplers import SAMPLERS, sampler_of
from tinyldm.diffusion.schedule import PREDICTIONS, Schedule
from tinyldm.diffusion.timesteps import _time_of, dpm_solver_steps, sigma_steps

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SOLVERS = ("euler", "euler_a", "heun", "dpm++2m", "dpm++2m_sde")
MEAN, SPREAD = 0.7, 0.5  # of the data


def sigma_at(schedule, t):
    """σ at a time step that need not be whole: log σ lies on straight lines between those."""
    return math.exp(np.interp(t, np.arange(len(schedule)), np.log(schedule.sigmas)))


def denoiser(schedule, mean=MEAN, spread=SPREAD):
    """What a perfect network predicts at x_t for data from N(mean, spread²)."""

    def predict(x, t):
        alpha_bar = 1 / (1 + sigma_at(schedule, t) ** 2)
        a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        surprise = (x - a * mean) / (a**2 * spread**2 + s**2)
        x0, noise = mean + a * spread**2 * surprise, s * surprise
        return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0}[
            schedule.prediction
        ]

    return predict


def run(name, schedule, x, steps, seed=0, **data):
    rng = np.random.default_rng(seed)
    options = {"noise": lambda: rng.normal(size=x.shape)} if SAMPLERS[name].needs_noise else {}
    return list(SAMPLERS[name](denoiser(schedule, **data), schedule, x, steps, **options))


# -------------------------------------------------------------------------------------------- grids


def test_sigmas_of_stable_diffusion():
    schedule = Schedule(STABLE_DIFFUSION)
    t, sigmas = sigma_steps(schedule, 3)
    np.testing.assert_array_equal(t, [999, 499.5, 0])
    np.testing.assert_allclose(sigmas, [14.6146, 1.6156, 0.02917, 0], atol=1e-3)
    t, sigmas = sigma_steps(Schedule(STABLE_DIFFUSION | {"use_karras_sigmas": True}), 3)
    middle = ((14.6146 ** (1 / 7) + 0.02917 ** (1 / 7)) / 2) ** 7
    np.testing.assert_allclose(sigmas, [14.6146, middle, 0.02917, 0], rtol=1e-4)
    np.testing.assert_allclose(t[[0, -1]], [999, 0], atol=1e-9)
    np.testing.assert_allclose([sigma_at(schedule, step) for step in t], sigmas[:-1])


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("grid", [sigma_steps, dpm_solver_steps])
def test_time_and_noise_never_rise(grid, spacing, karras):
    settings = {"timestep_spacing": spacing, "use_karras_sigmas": karras}
    schedule = Schedule(STABLE_DIFFUSION | settings)
    for steps in (1, 2, 7, 50, 499, 500, 999, 1000):
        t, sigmas = grid(schedule, steps)
        assert t.shape == (steps,) and sigmas.shape == (steps + 1,) and sigmas[-1] == 0
        assert (np.diff(t) <= 0).all() and (np.diff(sigmas) <= 0).all() and (sigmas[:-1] > 0).all()


def test_dpm_solver_may_end_with_the_least_noise():
    schedule = Schedule(STABLE_DIFFUSION | {"final_sigmas_type": "sigma_min"})
    assert dpm_solver_steps(schedule, 10)[1][-1] == schedule.sigmas[0]


@pytest.mark.parametrize(
    "name, key, value, only",
    [
        *((name, "use_beta_sigmas", True, "False") for name in ("euler", "heun", "dpm++2m")),
        *((name, "solver_order", 3, "2") for name in ("dpm++2m", "dpm++2m_sde")),
        *((name, "thresholding", True, "False") for name in ("ddpm", "ddim", "dpm++2m")),
        *((name, "lambda_min_clipped", -5.1, "-inf") for name in ("dpm++2m", "dpm++2m_sde")),
        ("dpm++2m", "variance_type", "'learned_range'", "fixed_small or .*"),
        ("ddpm", "variance_type", "'fixed_large_log'", "fixed_small or .* fixed_large"),
        ("heun", "clip_sample", True, "False"),
        *((name, "rescale_betas_zero_snr", True, "False") for name in ("heun", "pndm")),
        *((name, "sigma_max", 12.0, "null") for name in ("heun", "dpm++2m")),
        ("euler_a", "use_karras_sigmas", True, "False"),
        ("euler", "final_sigmas_type", "'sigma_max'", "zero or sigma_min"),
        ("euler", "timestep_type", "'continuous'", "discrete"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, key, value, only):
    message = (
        f"^scheduler_config.json: {key} = {value} is not implemented .*only {only}; take another"
    )
    value = value.strip("'") if isinstance(value, str) else value
    with pytest.raises(ConfigError, match=message):
        run(name, Schedule({key: value, "prediction_type": "v_prediction"}), np.ones(1), 5)


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("steps_offset", "1", "an integer of 0 to 16,777,216"),
        ("steps_offset", -1, "an integer of 0 to 16,777,216"),
        ("steps_offset", 1.0, "an integer of 0 to 16,777,216"),
        ("steps_offset", 10**30, "an integer of 0 to 16,777,216"),
        ("set_alpha_to_one", "false", "true or false"),
        ("set_alpha_to_one", 0, "true or false"),
        ("clip_sample_range", None, "a number"),
        ("beta_end", "0.02", "a number"),
        ("beta_end", float("nan"), "a number"),
        ("num_train_timesteps", True, "an integer of 1 to 100,000"),
        ("num_train_timesteps", 10**9, "an integer of 1 to 100,000"),
        ("sigma_min", [0.1], "a number or null"),
        ("timestep_spacing", {"leading": 1}, "a word"),
    ],
)
def test_a_value_of_another_kind_is_refused(key, value, expected):
    with pytest.raises(ConfigError) as error:
        Schedule({key: value})
    assert str(error.value).startswith(f"scheduler config: {key}: expected {expected}, found ")


@pytest.mark.parametrize("name", SOLVERS)
def test_configs_of_other_schedulers_are_taken_as_diffusers_takes_them(name):
    """What is said of another solver does not matter to Euler and Heun; DPM-Solver++ stays so."""
    usual = run(name, Schedule(STABLE_DIFFUSION), np.ones(1), 5)
    for others in (
        {"solver_type": "bh2", "solver_order": 2, "predict_x0": True},  # UniPC
        {"solver_type": "logrho", "algorithm_type": "deis", "solver_order": 2},  # DEIS
    ):
        found = run(name, Schedule(STABLE_DIFFUSION | others), np.ones(1), 5)
        np.testing.assert_array_equal(found, usual)
    if name in ("euler", "euler_a", "heun"):
        odd = Schedule(STABLE_DIFFUSION | {"solver_order": 3, "thresholding": True})
        np.testing.assert_array_equal(run(name, odd, np.ones(1), 5), usual)


# ------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_one_point_of_data_is_seen_at_every_step_and_reached(name, prediction):
    schedule = Schedule(
        STABLE_DIFFUSION | {"prediction_type": prediction, "timestep_spacing": "trailing"}
    )
    for steps in (1, 2, 3, 20):
        pairs = np.array(run(name, schedule, np.array([-2.0, 0.3]), steps, spread=0))
        np.testing.assert_allclose(pairs[:, 1], np.full((steps, 2), MEAN), atol=1e-9)
        np.testing.assert_allclose(pairs[-1, 0], [MEAN, MEAN], atol=1e-9)


def order(counts, errors):
    """The power of 1 / steps with which the error falls."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def solved(x, now, then):
    """Where the equation leads x / a from σ = now to σ = then."""
    return MEAN + (x - MEAN) * math.sqrt((SPREAD**2 + then**2) / (SPREAD**2 + now**2))


COUNTS = np.array([80, 160, 320, 640])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name, expected, tol", [("euler", 1, 0.05), ("heun", 2, 0.1)])
def test_error_falls_with_the_number_of_steps(name, expected, tol, prediction):
    """By the power that is the order of the method, where σ rises evenly from 0."""
    fine = 5120  # which all counts divide, so that time steps are whole
    schedule = Schedule(
        {
            "num_train_timesteps": fine + 1, "beta_start": 1e-8, "beta_end": 8 / fine,
            "timestep_spacing": "linspace", "prediction_type": prediction,
        }
    )  # fmt: skip
    most = schedule.sigmas[-1]
    exact = solved(1.3 * most, most, 0)
    ends = [run(name, schedule, np.array([1.3]), steps + 1)[-1][0] for steps in COUNTS]
    assert abs(order(COUNTS, [abs(end[0] - exact) for end in ends]) - expected) < tol


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_error_of_dpm_solver_falls_with_the_square_of_the_number_of_steps(prediction):
    """Order 2 in log σ, on a grid whose steps there become small all over.

    It rounds the time steps, not σ; so here the network is told σ.
    """
    schedule = Schedule(
        STABLE_DIFFUSION
        | {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
        | {"prediction_type": prediction}
    )
    network = denoiser(schedule)

    def sample(steps):
        told = iter(_time_of(schedule, dpm_solver_steps(schedule, steps)[1]))
        sampler = SAMPLERS["dpm++2m"]
        pairs = sampler(lambda x, _: network(x, next(told)), schedule, np.array([1.3]), steps)
        return list(pairs)[-1][0][0]

    least, most = schedule.sigmas[[0, -1]]
    exact = solved(1.3 * math.sqrt(1 + most**2), most, least) / math.sqrt(1 + least**2)
    errors = [abs(sample(steps) - exact) for steps in COUNTS]
    assert abs(order(COUNTS, errors) - 2) < 0.1


@pytest.mark.parametrize("name", ["euler_a", "dpm++2m_sde"])
def test_random_solvers_have_the_spread_of_the_data(name):
    """Of samples from many steps, by the affine map that a sampler is for such data."""
    steps = 400
    schedule = Schedule(STABLE_DIFFUSION | {"use_karras_sigmas": name == "dpm++2m_sde"})
    draws = iter(np.eye(steps + 2)[2:])
    *_, (y, _) = SAMPLERS[name](
        denoiser(schedule), schedule, np.eye(steps + 2)[1], steps, noise=lambda: next(draws)
    )
    assert abs(y[0] - MEAN) < 0.02
    assert abs(math.sqrt(((y[1:] - y[0]) ** 2).sum()) - SPREAD) < 0.02


WEIGHTS, MEANS, SPREADS = np.array([[0.3, 0.7], [-1.0, 1.2], [0.2, 0.3]])


@pytest.mark.parametrize("name", SAMPLERS)
def test_data_with_two_modes_have_both_with_their_shares(name):
    """From each quantile of the noise samplers without noise lead to that of the data."""
    schedule = Schedule(EVERY)

    def predict(x, t):
        alpha_bar = 1 / (1 + sigma_at(schedule, t) ** 2)
        a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        variance = alpha_bar * SPREADS**2 + 1 - alpha_bar
        away = x[:, None] - a * MEANS
        likely = WEIGHTS * np.exp(-0.5 * away**2 / variance) / np.sqrt(variance)
        return s * (likely * away / variance).sum(axis=1) / likely.sum(axis=1)

    share = (np.arange(2000) + 0.5) / 2000
    rng = np.random.default_rng(0)
    options = {"noise": lambda: rng.normal(size=2000)} if SAMPLERS[name].needs_noise else {}
    *_, (y, _) = SAMPLERS[name](predict, schedule, special.ndtri(share), 100, **options)
    found = special.ndtr((np.sort(y)[:, None] - MEANS) / SPREADS) @ WEIGHTS
    assert abs(found - share).max() < 0.03


def test_heun_asks_twice_a_step():
    asked = []
    schedule = Schedule(STABLE_DIFFUSION | {"timestep_spacing": "leading"})
    list(SAMPLERS["heun"](lambda x, t: asked.append(t) or x, schedule, np.ones(1), 4))
    assert asked == [750, 500, 500, 250, 250, 0, 0]


# ---------------------------------------------------------- beginning later, and changes on the way

EVERY = STABLE_DIFFUSION | {"clip_sample": False, "skip_prk_steps": True}
ONE_STEP = ("ddpm", "ddim", "euler", "euler_a", "heun")  # which carry nothing from step to step


def same_noise(name, x):
    """The options of a run whose i-th draw is always the same."""
    count = iter(range(10**6))
    draw = {"noise": lambda: np.full_like(x, math.cos(next(count)))}
    return draw if SAMPLERS[name].needs_noise else {}


def test_the_sampler_that_a_config_names():
    for name in ("ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpm++2m", "dpm++2m_sde"):
        kind = {"algorithm_type": "sde-dpmsolver++"} if name.endswith("sde") else {}
        assert sampler_of({"_class_name": SAMPLERS[name].scheduler} | kind) == name
    assert sampler_of({}) == "ddim" and sampler_of({"_class_name": "Another"}) == "Another"


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_are_where_the_steps_begin(name, spacing):
    """There the perfect prediction of a single point is its noise, so that no step is wrong."""
    schedule = Schedule(EVERY | {"timestep_spacing": spacing, "final_sigmas_type": "zero"})
    alphas_bar = SAMPLERS[name].levels(schedule, 7)
    assert alphas_bar.shape == (7,) and (np.diff(alphas_bar) > 0).all()
    assert 0 < alphas_bar[0] and alphas_bar[-1] < 1
    noise = np.array([0.3, -1.2])
    for start, alpha_bar in enumerate(alphas_bar):
        x = math.sqrt(alpha_bar) * MEAN + math.sqrt(1 - alpha_bar) * noise
        options = {} if not SAMPLERS[name].needs_noise else {"noise": lambda: np.zeros(2)}
        perfect, said = denoiser(schedule, spread=0), []

        def predict(x, t, perfect=perfect, said=said):
            said.append(perfect(x, t))
            return said[-1]

        path = list(SAMPLERS[name](predict, schedule, x, 7, start=start, **options))
        assert len(path) == 7 - start
        np.testing.assert_allclose(said[0], noise, rtol=1e-5)  # σ is interpolated
        for _, x0 in path:
            np.testing.assert_allclose(x0, MEAN, rtol=1e-2)


@pytest.mark.parametrize("name", ONE_STEP)
@pytest.mark.parametrize("start", [0, 1, 5])
def test_from_a_later_step_it_goes_on_as_before(name, start):
    schedule = Schedule(EVERY | {"timestep_spacing": "leading"})
    x = np.array([0.3, -1.2])
    predict = denoiser(schedule)

    def path(x, skip, **options):
        draws = same_noise(name, x)
        for _ in range(skip if draws else 0):
            draws["noise"]()
        return list(SAMPLERS[name](predict, schedule, x, 6, **draws, **options))

    whole = path(x, 0)
    begin = x if start == 0 else whole[start - 1][0]
    for found, expected in zip(path(begin, start, start=start), whole[start:], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_a_start_x_is_noise_alone(name):
    """`start=0` is for latents that stand at the first step; in "linspace" that is not the same."""
    x = np.array([0.3, -1.2])
    for spacing, same in (
        ("leading", True),
        ("linspace", name not in ("euler", "euler_a", "heun")),
    ):
        schedule = Schedule(EVERY | {"timestep_spacing": spacing})
        ends = [
            list(
                SAMPLERS[name](denoiser(schedule), schedule, x, 6, start=start,
                               **same_noise(name, x))
            )[-1][0]
            for start in (None, 0)
        ]  # fmt: skip
        assert np.allclose(*ends, rtol=1e-12) == same


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_change_is_what_the_next_step_finds(name):
    schedule = Schedule(EVERY)
    x = np.array([0.3, -1.2])
    predict = denoiser(schedule)

    def path(post_step=None):
        options = {} if post_step is None else {"post_step": post_step}
        return list(SAMPLERS[name](predict, schedule, x, 6, **same_noise(name, x), **options))

    usual, seen = path(), []

    def watch(x, i):
        seen.append((i, x))
        return x

    for found, expected in zip(path(watch), usual, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert [i for i, _ in seen] == list(range(6))
    for (_, found), (expected, _) in zip(seen, usual, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)

    changed = path(lambda x, i: x + (i == 2))
    for i, ((found, _), (expected, _)) in enumerate(zip(changed, usual, strict=True)):
        if i < 2:
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        elif i == 2:
            np.testing.assert_allclose(found, expected + 1, rtol=1e-12)
        else:
            assert abs(found - expected).min() > 1e-3
