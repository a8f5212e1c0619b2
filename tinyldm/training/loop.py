"""The loop of training, the same for both stages."""

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinyldm.files import replacing
from tinyldm.training import snapshots
from tinyldm.training.adversarial import Adversarial
from tinyldm.training.config import STAGES, Stage
from tinyldm.training.estimate import duration, mean_seconds
from tinyldm.training.optim import learning_rate
from tinyldm.training.signals import Interruptible, Stopped
from tinyldm.training.state import State, save_state
from tinyldm.training.step import stage_gradient, train_step

SAVE_EVERY = 45.0  # seconds between states
LOG_EVERY = 10  # steps between lines of metrics, and between looks at the loss
CALIBRATION = (10, 40)  # steps that are timed to find how many fit into a stage's seconds


class Diverged(RuntimeError):
    """The loss is no longer a number. The last state was saved before that."""


def fit(
    run: Path,
    state: State,
    stage: Stage,
    loss_fn: Callable | Adversarial,
    batch_at: Callable[[int], tuple],
    stop: Interruptible,
    report: Callable[[], tuple[dict, str]],
    say: Callable[[str], None],
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Steps of AdamW until the stage is done. The state is saved at least every minute.

    batch_at: `batch_at(step) → the batch of that step`, whatever came before.
    report: `report() → ({name: number}, line of text)`, measured now and then.
    after_step: called after every step, before the state is saved.
    """
    begun = state.step
    if state.total is None:
        state.total = stage.steps
    saved = reported = time.monotonic()
    step_times = []
    metrics_file = Path(run) / "training" / "metrics.jsonl"
    forget_metrics_after(metrics_file, state)
    bar = tqdm(
        total=state.total, initial=state.step, desc=state.stage, unit="step", disable=None,
        smoothing=0.05, dynamic_ncols=True,
    )  # fmt: skip
    beside = {}  # numbers of the last step
    with (
        stage_gradient(loss_fn, state, stage.parts, beside) as gradient_of,
        bar,
        open(metrics_file, "a", 1, "utf-8") as metrics,
    ):

        def log(numbers):
            line = {"stage": state.stage, "step": state.step} | numbers
            metrics.write(json.dumps(line | {"time": round(time.time(), 2)}) + "\n")

        while state.total is None or state.step < state.total:
            started = time.monotonic()
            total = state.total or 10**9
            rate = learning_rate(state.step, total, stage.rate, stage.warmup, stage.decay)
            loss, norm = train_step(state, gradient_of, batch_at(state.step), rate, stage.ema)
            state.step += 1
            after_step()
            bar.update()
            if state.step % LOG_EVERY == 0 or state.step == state.total or stop.number:
                numbers = {"loss": loss, "norm": norm} | beside
                numbers = {name: _finite(number, state) for name, number in numbers.items()}
                log({"rate": rate} | numbers)
                bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            step_times.append(time.monotonic() - started)
            if state.total is None and len(step_times) >= CALIBRATION[1]:
                step_seconds = float(np.median(step_times[CALIBRATION[0] :]))
                if state.discriminator:
                    later = _seconds_later(state, gradient_of, batch_at(state.step))
                    step_seconds = mean_seconds(state.config, step_seconds, later)
                    beside.clear()
                state.total = max(state.step + 1, begun + int(stage.seconds / step_seconds))
                bar.total = state.total
                bar.refresh()
            if stop.number or time.monotonic() - saved > SAVE_EVERY or state.step == state.total:
                for number in (loss, norm, *beside.values()):
                    _finite(number, state)
                save_state(run, state)
                saved = time.monotonic()
            if stop.number:
                raise Stopped(stop.number)
            if snapshots.due(state.step, state.total, time.monotonic() - reported):
                numbers, text = report()
                if numbers:
                    log(numbers)
                with bar.external_write_mode():
                    say(_progress(state, _finite(loss, state), step_times) + text)
                reported = time.monotonic()


def _seconds_later(state, gradient_of, batch):
    """Of a step with the discriminator: its gradients, which are most of it, and go unused."""
    state.total = 0  # so that it has begun
    times = []
    for _ in range(5):
        started = time.monotonic()
        float(gradient_of(batch)[0])  # waits for a GPU
        times.append(time.monotonic() - started)
    state.total = None
    return float(np.median(times))


def _progress(state, loss, step_times):
    seconds = float(np.mean(step_times[-100:]))
    left = (state.total - state.step) * seconds
    return (
        f"  {state.stage} {state.step}/{state.total}: {1 / seconds:.1f} steps/s, "
        f"{duration(left)} left, loss {loss:.4f}"
    )


def forget_metrics_after(file: Path, state: State) -> None:
    """Drop the lines of steps that will be done again, and one that was cut off."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            before = STAGES.index(entry["stage"]) - STAGES.index(state.stage)
            if before < 0 or (before == 0 and entry["step"] <= state.step):
                kept.append(line + "\n")
    with replacing(file) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _finite(number, state):
    number = float(number)
    if not math.isfinite(number):
        raise Diverged(
            f"stage {state.stage}, step {state.step}: loss or gradient is {number}. The last "
            "saved state is intact; start again with another --seed, or in Python with a lower "
            "learning rate"
        )
    return number
