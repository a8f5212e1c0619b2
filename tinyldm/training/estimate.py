"""Estimate of a run's time and memory before it starts: real steps on random data, measured."""

import contextlib
import math
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from tinyldm.backend import to_device
from tinyldm.data.dataset import Dataset
from tinyldm.kernels.cpu.processes import available
from tinyldm.machine import duration, free_memory, gigabytes, held_memory
from tinyldm.models import ClassNames, Tokenizer
from tinyldm.sampling.tasks import takes_whole_image
from tinyldm.threads import cores
from tinyldm.training.config import STAGES, Config
from tinyldm.training.latents import AT_ONCE, all_gaussians
from tinyldm.training.loop import mean_seconds
from tinyldm.training.losses import Features
from tinyldm.training.networks import Models
from tinyldm.training.presets import ENOUGH, is_demo
from tinyldm.training.stages import Run, begin, second_stage
from tinyldm.training.step import stage_gradient, train_step

CALLS = 8  # of a step, at most; more would add nothing
WORTH_ANOTHER = 5.0  # seconds of a first call, below which there is a second one
CAPTIONS = ["a large red circle on blue at the left", "another"]  # any will do


@dataclass(frozen=True)
class RunEstimate:
    """Estimate of a run. What differs by stage is {"autoencoder": …, "denoiser": …}."""

    step_seconds: dict[str, float]
    steps: dict[str, int]
    encoding: float  # seconds between the stages, in which every image is encoded
    memory: int  # bytes, the most that its processes will hold
    held: int  # of them, what it held before
    free: int | None  # bytes that it could take beside those; None if unknown
    enough: int | None = None  # minutes for good images, where the demo's own are too few for them

    @property
    def seconds(self) -> float:
        """Return the seconds of training; where steps are given, images on the way come on top."""
        steps = sum(seconds * self.steps[stage] for stage, seconds in self.step_seconds.items())
        return steps + self.encoding

    @property
    def fits(self) -> bool:
        """Return whether the memory suffices, as far as it is known."""
        return self.free is None or self.memory - self.held <= self.free

    @property
    def cannot_fit(self) -> bool:
        """Return whether it cannot suffice, even if the estimate is half as much again too high."""
        return self.free is not None and self.memory - self.held > 1.5 * self.free

    def announce(self, say: Callable[[str], None]) -> None:
        """Print the estimate, and what to do if the memory does not suffice."""
        free = "" if self.free is None else f" ({gigabytes(self.free)} are free)"
        say(
            f"{_added(self.steps)} steps will take about {duration(self.seconds)}, plus images "
            f"to look at, and {gigabytes(self.memory)} of memory{free}"
        )
        if self.enough:
            say(
                f"  95 % of the captions or more come out right after {_added(ENOUGH)} steps. Here "
                f"they take {self.enough} minutes: tinyldm demo --overwrite --minutes {self.enough}"
            )
        if not self.fits:
            say(
                "  that is more than is free: close other programs, or take fewer images, a "
                "smaller --size or --preset, --accumulate or --checkpointing"
            )


def estimate_run(
    config: Config,
    images: int,
    device: str = "cpu",
    features: Features | None = None,
    seconds: float = 2.0,
) -> RunEstimate:
    """Estimate what a run of `config` takes on this machine.

    images: number of training images. They are in memory already, as when a run begins.
    features: the network of a perceptual loss, where the config has one.
    seconds: to spend at the most; a step of each stage is made even where it takes longer.
    Memory is that of the host, on a GPU too. DeviceError where the device is not there.
    """
    free, held = free_memory(), held_memory()
    data, tokenizer = _some_data(config)
    models = Models(config, tokenizer, features)
    first_stage = to_device(models.vae.init(np.random.default_rng(0)), device)
    step_seconds, states, peaks = {}, [], []
    for name in models.stages:
        with _traced() as traced:
            if name == models.stages[0]:
                state = begin(models, data, "", device, _silent)
            else:
                state = second_stage(models, first_stage, data, "", device, _silent)
            job = Run("", state, models, data, data, device, _silent).job()
            batch = job.batch_at(0)
            # Parameters, and the gradients of other processes, lie where tracing does not see them.
            trained = sum(w.nbytes for w in (state.params | state.discriminator).values())
            states.append(traced()[0] + trained * cores())
        stage = getattr(config, name)
        state.total = 0  # so that a discriminator has begun
        with stage_gradient(job.loss_fn, state, stage.parts, {}, processes=1) as threads:
            _, peak = _measure(partial(_step, state, threads, batch), 0, device)
        peaks.append(peak)
        with stage_gradient(job.loss_fn, state, stage.parts, {}) as in_training:
            step = partial(_step, state, in_training, batch)
            step_seconds[name], _ = _measure(step, seconds / 2, device)
            if state.discriminator:
                state.total = None
                before, _ = _measure(step, seconds / 2, device)
                step_seconds[name] = mean_seconds(config, before, step_seconds[name])
        del state, job, batch, threads, in_training, step
    encoding, encoded = _encoding(models, first_stage, data.images, images, device, seconds / 10)
    copies = 1 + takes_whole_image(config.task)  # of every image, encoded
    encoding *= copies
    latents = 4 * images * math.prod(config.latent_shape) * copies
    saving = 2 * sum(states)  # copies: in the order of the file, and as the file's bytes
    # What is freed is rarely given back to the system, so what is needed in turn adds up. Of the
    # latents there are the mean, the standard deviation, the moments they came from, and a copy.
    memory = held + sum(states) + max(*peaks, saving) + encoded + 4 * latents
    # A worker process keeps its copy of the memory that is overwritten here after the fork, and
    # all that its own work has freed.
    others = available() - 1 if device == "cpu" else 0
    memory += others * (max(states) + max(peaks))
    before = {STAGES[1]: encoding}  # seconds of a stage that pass before its first step
    steps = {
        name: _steps(getattr(config, name), each, before.get(name, 0.0))
        for name, each in step_seconds.items()
    }
    few = is_demo(config) and any(steps[name] < n for name, n in ENOUGH.items())
    enough = _minutes(config, step_seconds, before) if few else None
    return RunEstimate(step_seconds, steps, encoding, int(memory), held, free, enough)


def _some_data(config):
    """Make a few images with captions, and a tokenizer of about the size that the run will have."""
    rng, n = np.random.default_rng(0), 8 * cores()
    images = rng.integers(0, 256, (n, *config.sides, 3), np.uint8)
    captions = [CAPTIONS[i % 2] for i in range(n)]
    if config.has_classes:
        tokenizer = ClassNames(CAPTIONS)
    else:
        tokenizer = Tokenizer.train(captions, config.vocabulary, config.tokens)
    return Dataset(images, captions, captions, maps=images), tokenizer


def _silent(line):
    """Say nothing: these stages are not those of the run."""


def _added(steps):
    return " + ".join(f"{number:,}" for number in steps.values())


def _steps(stage, step_seconds, before):
    return stage.steps or max(1, int((stage.seconds - before) / step_seconds))


def _minutes(config, step_seconds, before):
    """Return the whole minutes in which both stages take ENOUGH steps, each with its share.

    A tenth is for the images on the way.
    """
    lengths = {name: getattr(config, name).seconds for name in STAGES}
    shares = (
        (before.get(name, 0.0) + ENOUGH[name] * step_seconds[name]) / length
        for name, length in lengths.items()
    )
    return math.ceil(1.1 * max(shares) * sum(lengths.values()) / 60)


def _step(state, gradient_of, batch):
    loss, _ = train_step(state, gradient_of, batch, rate=1e-4, ema=0.99)
    float(loss)  # waits for a GPU


def _encoding(models, params, images, count, device, seconds):
    """Measure the seconds to encode so many images, and the bytes for those encoded at once."""
    encode = partial(all_gaussians, models, params, images, device)
    encode()  # each thread has its scratch memory now, which does not grow with the images
    each, peak = _measure(encode, seconds, device)
    n = len(images)
    return each * count / n, peak * min(count, AT_ONCE * cores()) / n


def _measure(function, seconds, device):
    """Time calls for so many seconds, within reason → seconds of a call, and its peak bytes."""
    with _traced() as traced:
        times = [_timed(function)]
        _, peak = traced()
    # The first is slower: on the CPU up to twice, as new memory is, and on a GPU by far.
    least = 2 if device != "cpu" or times[0] < WORTH_ANOTHER else 1
    while len(times) < least or (len(times) < CALLS and sum(times) + times[-1] < seconds):
        times.append(_timed(function))
    return float(np.median(times[1:] or times)), peak


def _timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@contextlib.contextmanager
def _traced():
    """Yield a function → bytes allocated since the block began: (now, at the most)."""
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield lambda: tuple(size - before for size in tracemalloc.get_traced_memory())
    finally:
        if ours:
            tracemalloc.stop()
