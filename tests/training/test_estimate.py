"""What a run will take: the shapes that are tried, and what is made of the measurements."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import strict

from tinyldm import backend, threads
from tinyldm.backend import DeviceError
from tinyldm.models import Tokenizer
from tinyldm.nn import no_grad
from tinyldm.training import estimate
from tinyldm.training.config import Config, Stage
from tinyldm.training.estimate import RunEstimate, estimate_run
from tinyldm.training.networks import Models
from tinyldm.training.presets import PRESETS, is_demo, make_config

STAGE = Stage(batch=4, rate=1e-3, warmup=2, ema=0.9, steps=6)
CONFIG = Config(
    side=16,
    autoencoder=STAGE,
    denoiser=dataclasses.replace(STAGE, batch=6, steps=7),
    vae_widths=(4, 8),
    unet_widths=(8, 16),
    unet_attention=(False, True),
    heads=2,
    groups=4,
    text_width=8,
)


@pytest.fixture(autouse=True)
def short_estimate():
    """Here it is as long as it is."""


@pytest.fixture
def no_timing(monkeypatch):
    """One call of everything, which takes a second of a made-up clock."""
    monkeypatch.setattr(estimate, "_timed", lambda function: (function(), 1.0)[1])


@pytest.mark.slow
def test_seconds_are_those_of_the_steps_and_of_encoding(no_timing, monkeypatch):
    monkeypatch.setattr(estimate, "cores", lambda: 2)  # eight images each are encoded
    found = estimate_run(CONFIG, 160)
    assert found.steps == {"autoencoder": 6, "denoiser": 7}
    assert found.step_seconds == {"autoencoder": 1, "denoiser": 1}
    assert found.encoding == 10
    assert found.seconds == 6 + 7 + 10


def test_steps_fill_the_seconds_of_a_stage(no_timing):
    timed = dataclasses.replace(STAGE, steps=None, seconds=12.5)
    short = dataclasses.replace(STAGE, steps=None, seconds=0.1)
    config = dataclasses.replace(CONFIG, autoencoder=timed, denoiser=short)
    assert estimate_run(config, 16).steps == {"autoencoder": 12, "denoiser": 1}


def test_a_real_estimate():
    found = estimate_run(CONFIG, 64, seconds=0.1)
    assert all(seconds > 0 for seconds in found.step_seconds.values()) and found.encoding > 0
    assert found.memory > found.held
    assert not tracemalloc.is_tracing()


def test_what_is_tried_has_the_shapes_of_a_run(no_timing, monkeypatch):
    batches = []
    step = estimate.train_step

    def record(state, gradient, batch, **others):
        batches.append([(x.shape, x.dtype.kind) for x in batch])
        return step(state, gradient, batch, **others)

    monkeypatch.setattr(estimate, "train_step", record)
    estimate_run(CONFIG, 64)
    latents = ((6, 8, 8, 4), "f")
    autoencoder = [((4, 16, 16, 3), "f"), ((4, 8, 8, 4), "f")]
    denoiser = [latents, latents, ((6, 16), "i"), ((6,), "i")]
    # For the memory, and for the time, twice each: the first call is slower.
    assert batches == [autoencoder] * 4 + [denoiser] * 4


# ------------------------------------------------------------------------------------------ memory


def extra(config, images=16):
    found = estimate_run(config, images)
    return found.memory - found.held


@pytest.mark.slow
def test_memory_holds_the_state_and_the_activations(no_timing):
    """Of the larger stage at least: parameters, two moments, average, gradient."""
    models = Models(CONFIG, Tokenizer.train([""]))
    params = models.unet.init(np.random.default_rng(0))
    state = 5 * sum(w.nbytes for w in params.values())
    assert state < extra(CONFIG) < 30e6
    large = dataclasses.replace(CONFIG, denoiser=dataclasses.replace(STAGE, batch=128))
    one_activation = 4 * (128 - 6) * 8 * 8 * 8
    assert extra(large) - extra(CONFIG) > 10 * one_activation


@pytest.mark.slow
def test_latents_of_every_image_count_four_times(no_timing, monkeypatch):
    """While they are made: moments, which are two, their clipped copy, and the result."""
    monkeypatch.setattr(estimate, "_encoding", lambda *args: (0.0, 0))
    for module in (estimate, threads):  # one thread: what several hold at a time is by chance
        monkeypatch.setattr(module, "cores", lambda: 1)
    extra(CONFIG)  # now it has its scratch memory
    latents = 4 * 8 * 8 * 4
    assert extra(CONFIG, 101_000) - extra(CONFIG, 1000) == pytest.approx(4e5 * latents, rel=1e-3)


def test_encoding_takes_as_much_as_all_threads_together(monkeypatch):
    """Within 40 %, from a measurement on eight images a thread."""
    for module in (estimate, threads):
        monkeypatch.setattr(module, "cores", lambda: 1)
    models = Models(dataclasses.replace(CONFIG, side=64), Tokenizer.train([""]))
    params = models.vae.init(np.random.default_rng(0))
    _, found = estimate._encoding(
        models, params, np.zeros((8, 64, 64, 3), np.uint8), 10_000, "cpu", 0
    )
    images = np.zeros((estimate.AT_ONCE, 64, 64, 3), np.float32)

    def encode():
        with no_grad():
            models.vae.encode(params, images)

    _, true = estimate._measure(encode, 0, "cpu")
    assert true < found < 1.4 * true


def test_who_traces_already_goes_on_tracing(no_timing):
    tracemalloc.start()
    try:
        estimate_run(CONFIG, 16)
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_a_peak_is_counted_from_where_it_began():
    tracemalloc.start()
    try:
        kept = np.ones(1_000_000)
        _, peak = estimate._measure(lambda: np.ones(2_000_000), 0, "cpu")
    finally:
        tracemalloc.stop()
    assert peak == pytest.approx(2 * kept.nbytes, rel=0.01)


# -------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    "device, seconds, times, expected",
    [
        ("cpu", 10, [4, 1, 2, 3, 9], 2),  # the next would not fit
        ("cpu", 1, [5, 1], 5),  # not even a second one does
        ("cpu", 1, [4, 2, 9], 2),  # a second one tells more, and is short enough
        ("cuda", 1, [50, 3, 9], 3),  # there the first says nothing
        ("cpu", 1e9, [7, *[1] * 99], 1),
    ],
)
def test_which_times_count(monkeypatch, device, seconds, times, expected):
    clock = iter(times)
    monkeypatch.setattr(estimate, "_timed", lambda function: next(clock))
    assert estimate._measure(None, seconds, device)[0] == expected
    assert len(list(clock)) >= len(times) - estimate.CALLS


@pytest.mark.slow
def test_on_a_gpu(no_timing, monkeypatch):
    """On a double of CuPy, which accepts nothing that a GPU would not."""

    monkeypatch.setitem(backend.SPECIAL_FUNCTIONS, "strict", "strict")
    monkeypatch.setattr(backend, "_cupy", lambda device: strict)
    found = estimate_run(CONFIG, 16, device="cuda")
    assert found.step_seconds == {"autoencoder": 1, "denoiser": 1}


def test_without_the_device_it_says_so():
    with pytest.raises(DeviceError, match="expected"):
        estimate_run(CONFIG, 16, device="abacus")


# ------------------------------------------------------------------------------------ what it says


FOUND = RunEstimate(
    step_seconds={"autoencoder": 0.1, "denoiser": 0.15},
    steps={"autoencoder": 600, "denoiser": 1400},
    encoding=20.0,
    memory=900_000_000,
    held=200_000_000,
    free=6_200_000_000,
)


def said(found):
    lines = []
    found.announce(lines.append)
    return lines


def test_what_a_person_is_told():
    assert said(FOUND) == [
        "600 + 1,400 steps will take about 4 min 50 s, plus images to look at, and 0.9 GB of "
        "memory (6.2 GB are free)"
    ]
    unknown = dataclasses.replace(FOUND, free=None)
    assert said(unknown)[0].endswith("0.9 GB of memory") and len(said(unknown)) == 1


def test_a_slow_machine_hears_how_long_good_images_take():
    assert said(dataclasses.replace(FOUND, enough=12))[1:] == [
        "  95 % of the captions or more come out right after 500 + 1,800 steps. Here they take 12 "
        "minutes: tinyldm demo --overwrite --minutes 12"
    ]


@pytest.mark.parametrize(
    "step_seconds, steps, enough",
    [
        # Within 44 and 216 s, of which 20 pass while the images are encoded.
        ({"autoencoder": 0.05, "denoiser": 0.1}, {"autoencoder": 880, "denoiser": 1960}, None),
        # 20 + 1,800 · 0.3 s are 560 of 216: of the 260 s of both, 674, and a tenth more.
        ({"autoencoder": 0.05, "denoiser": 0.3}, {"autoencoder": 880, "denoiser": 653}, 13),
        # 500 · 0.2 s are 100 of 44: 591 s, and a tenth more.
        ({"autoencoder": 0.2, "denoiser": 0.1}, {"autoencoder": 220, "denoiser": 1960}, 11),
    ],
)
def test_minutes_that_the_demo_needs(monkeypatch, step_seconds, steps, enough):
    demo = dataclasses.replace(PRESETS["demo"], seed=3, keep=5)
    every = iter([x for each in step_seconds.values() for x in (0.0, each)])
    monkeypatch.setattr(estimate, "_measure", lambda *args: (next(every), 0))
    monkeypatch.setattr(estimate, "_encoding", lambda *args: (20.0, 0))
    found = estimate_run(demo, 20_000)
    assert (found.steps, found.enough) == (steps, enough)
    for changed in ({"condition": "class-time"}, {"decay": "constant"}, {"accumulate": 4}):
        assert not is_demo(make_config("demo", **changed)), "other runs need others"


def test_too_little_memory_is_said_with_what_to_do():
    assert len(said(dataclasses.replace(FOUND, free=700_000_000))) == 1  # 0.2 GB are held already
    line, advice = said(dataclasses.replace(FOUND, free=699_999_999))
    assert "(0.7 GB are free)" in line
    assert "more than is free" in advice and "--size" in advice
