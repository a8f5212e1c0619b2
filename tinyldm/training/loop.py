"""The training loop, the same for both stages."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyldm.backend import Array, on_host
from tinyldm.machine import duration
from tinyldm.nn.optim import learning_rate
from tinyldm.progress import Bar
from tinyldm.training import snapshots
from tinyldm.training.adversarial import Adversarial
from tinyldm.training.config import Config, Stage
from tinyldm.training.metrics import MetricsLog, diverged, finite
from tinyldm.training.signals import Interruptible, Stopped
from tinyldm.training.state import State, save_state
from tinyldm.training.step import Gradient, NotFinite, stage_gradient, train_step

SAVE_EVERY = 45.0  # seconds between states
LOG_EVERY = 10  # steps between lines of metrics, and between looks at the loss
CALIBRATION = (10, 40)  # steps that are timed to find how many fit into a stage's seconds
CORRECTIONS = (0.2, 0.45, 0.7, 0.85)  # shares of the steps after which their number is corrected
MOST_LEFT_OUT = 10  # steps in a row, or half of a stage's
RECENT = 100  # steps, the last ones, whose time says how long a step takes


def _nothing():
    pass


@dataclass(frozen=True)
class Job:
    """The batches of a stage, and what is done besides its steps.

    batch_at: `batch_at(step) → the batch of that step`, whatever came before. report: measures now
    and then, `report() → ({name: value}, line of text)`. after_step: called after every step,
    before the state is saved. say: takes lines of progress.
    """

    loss_fn: Callable | Adversarial
    batch_at: Callable[[int], tuple[Array, ...]]
    say: Callable[[str], None]
    report: Callable[[], tuple[dict, str]] = lambda: ({}, "")
    after_step: Callable[[], None] = _nothing


def fit(folder: Path, state: State, make_job: Callable[[], Job], stop: Interruptible) -> None:
    """Take steps until the present stage is done; save the state at least every minute.

    A stage's seconds hold the preparation of its job and the images on the way, too.
    A step whose loss or gradient is no finite number is left out, and said (see `Steps`). Raises
    Diverged after ten in a row, and Stopped after a signal, with the state saved.
    """
    stage: Stage = getattr(state.config, state.stage)
    if state.total is None:
        state.total = stage.steps
    began = time.monotonic()
    job = make_job()
    pace = Pace(stage, began if state.step == 0 else time.monotonic())  # prepared again: for free
    saved = reported = time.monotonic()
    extra = {}  # further values of the last step, for the log
    steps = Steps(state, job.say)
    with (
        stage_gradient(job.loss_fn, state, stage.parts, extra) as gradient_of,
        MetricsLog(folder, state) as log,
        _progress_bar(state) as bar,
    ):
        while state.total is None or state.step < state.total:
            started = time.monotonic()
            total = state.total or 10**9
            rate = learning_rate(state.step, total, stage.rate, stage.warmup, stage.decay)
            batch = job.batch_at(state.step)
            try:
                steps.add(*train_step(state, gradient_of, batch, rate, stage.ema))
            except NotFinite as error:
                steps.leave_out(state.step, error)
            state.step += 1
            job.after_step()
            bar.update()
            last = bool(stop.number) or state.step == state.total
            if last or state.step % LOG_EVERY == 0:
                steps.look()
                if not steps.left_out:
                    numbers = {name: finite(number, state) for name, number in extra.items()}
                    log.write({"rate": rate, "loss": steps.loss, "norm": steps.norm} | numbers)
                    bar.set_postfix(loss=f"{steps.loss:.4f}", refresh=False)
            pace.add(time.monotonic() - started, state)
            corrected = pace.is_due(state) and not last
            if corrected:
                pace.set_total(state, gradient_of, batch)
                extra.clear()
                bar.total = state.total
                bar.refresh()
            if last or corrected or time.monotonic() - saved > SAVE_EVERY:
                steps.look()
                save_state(folder, state)
                saved = time.monotonic()
            if stop.number:
                raise Stopped(stop.number)
            if snapshots.due(state.step, state.total, time.monotonic() - reported):
                numbers, text = job.report()
                if numbers:
                    log.write(numbers)
                with bar.external_write_mode():
                    steps.look()
                    job.say(pace.line(state, steps.loss) + text)
                reported = time.monotonic()


def _progress_bar(state):
    return Bar(
        total=state.total, initial=state.step, desc=state.stage, unit="step", disable=None,
        smoothing=0.05, dynamic_ncols=True,
    )  # fmt: skip


@dataclass
class Steps:
    """The losses of a stage's steps, and the steps that were left out.

    On a GPU they are looked at with the next line of the log: before, each would have to be waited
    for. Of a step that was left out there, the layer is not known.
    """

    state: State
    say: Callable[[str], None]
    loss: float = 0.0  # of the last step that was not left out, and the norm of its gradient
    norm: float = 0.0
    left_out: int = 0  # steps since then
    unseen: list[tuple[int, Array, Array]] = field(default_factory=list)

    def add(self, loss: Array, norm: Array) -> None:
        """Note a step, which is not yet counted in the state."""
        self.unseen.append((self.state.step, loss, norm))
        if on_host(norm):
            self.look()

    def look(self) -> None:
        """Look at the steps since the last time."""
        for step, loss, norm in self.unseen:
            loss, norm = float(loss), float(norm)
            if math.isfinite(loss) and math.isfinite(norm):
                self.loss, self.norm, self.left_out = loss, norm, 0
            else:
                self.leave_out(step, NotFinite(loss, norm))
        self.unseen.clear()

    def leave_out(self, step: int, error: NotFinite) -> None:
        """Say that a step was left out. Raises Diverged after ten in a row, or half of a stage."""
        self.left_out += 1
        total = self.state.total or 2 * MOST_LEFT_OUT
        if self.left_out >= min(MOST_LEFT_OUT, max(1, total // 2)):
            raise diverged(self.state, f"{error}, for {self.left_out} steps in a row") from None
        self.say(f"  {self.state.stage} {step + 1}: left out, as {error}")


@dataclass
class Pace:
    """Pace of a stage: the seconds that its steps take, and those of all between them."""

    stage: Stage
    counted: float  # the time up to which state.seconds is counted
    seconds: deque = field(  # of the last steps, and of the first ones, which are slower
        default_factory=lambda: deque(maxlen=CALIBRATION[0] + RECENT)
    )

    def add(self, seconds: float, state: State) -> None:
        """Count the seconds of one more step; where steps are given, the state knows no time."""
        self.seconds.append(seconds)
        if self.stage.seconds is not None:
            before, self.counted = self.counted, time.monotonic()
            state.seconds += self.counted - before

    def is_due(self, state: State) -> bool:
        """Return whether it is time to find how many steps fit into the stage's seconds."""
        if self.stage.seconds is None or len(self.seconds) < CALIBRATION[1]:
            return False
        if state.total is None:
            return True
        k = state.corrections
        return k < len(CORRECTIONS) and state.step >= CORRECTIONS[k] * state.total

    def set_total(self, state: State, gradient_of: Gradient, batch: tuple[Array, ...]) -> None:
        """Set the number of steps to what the stage's seconds allow, at the pace of late.

        A machine that was busy while the first steps were timed is free later, or the reverse.
        """
        # A GPU is waited for now and then, so only the mean of many steps tells what one takes.
        average = np.median if on_host(state.params.flat) else np.mean
        step_seconds = float(average(list(self.seconds)[CALIBRATION[0] :]))
        if state.total is None:
            if state.discriminator:
                later = seconds_with_discriminator(state, gradient_of, batch)
                step_seconds = mean_seconds(state.config, step_seconds, later)
                state.seconds += len(self.seconds) * step_seconds - sum(self.seconds)
                state.corrections = len(CORRECTIONS)  # its steps are of two kinds
        else:
            state.corrections += 1
        left = max(0.0, self.stage.seconds - state.seconds)
        state.total = state.step + max(1, int(left / step_seconds))

    def line(self, state: State, loss: float) -> str:
        """Tell how far a stage is, and how long it will still take."""
        seconds = float(np.mean(list(self.seconds)[-RECENT:]))
        left = (state.total - state.step) * seconds
        return (
            f"  {state.stage} {state.step}/{state.total}: {1 / seconds:.1f} steps/s, "
            f"{duration(left)} left, loss {loss:.4f}"
        )


def mean_seconds(config: Config, before: float, after: float) -> float:
    """Average the seconds of a step of stage 1 over its steps without and with discriminator."""
    return config.adversarial_start * before + (1 - config.adversarial_start) * after


def seconds_with_discriminator(
    state: State, gradient_of: Gradient, batch: tuple[Array, ...]
) -> float:
    """Time a step with the discriminator: its gradients, which are most of it, go unused."""
    state.total = 0  # so that it has begun
    times = []
    for _ in range(6):
        started = time.monotonic()
        float(gradient_of(batch)[0])  # waits for a GPU
        times.append(time.monotonic() - started)
    state.total = None
    return float(np.median(times[3:]))  # the first ones are slower, on a GPU by far
