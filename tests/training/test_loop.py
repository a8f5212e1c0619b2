"""Tests of the training loop's bookkeeping: steps that were left out, and the pace of a stage."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import strict

from tinyldm.training import loop
from tinyldm.training.loop import (
    CALIBRATION,
    CORRECTIONS,
    MOST_LEFT_OUT,
    Pace,
    Steps,
    seconds_with_discriminator,
)
from tinyldm.training.metrics import Diverged


def steps_of(total):
    said = []
    state = SimpleNamespace(stage="denoiser", step=4, total=total)
    return Steps(state, said.append), said


@pytest.mark.parametrize(
    "total, most", [(None, MOST_LEFT_OUT), (1000, MOST_LEFT_OUT), (6, 3), (3, 1), (1, 1)]
)
def test_as_many_steps_may_be_left_out_in_a_row(total, most):
    steps, said = steps_of(total)
    for _ in range(most - 1):
        steps.add(np.float64(math.nan), np.float64(1))
    assert len(said) == steps.left_out == most - 1
    with pytest.raises(Diverged, match=f"for {most} steps in a row"):
        steps.add(np.float64(1), np.float64(math.inf))


def test_a_step_that_can_be_ends_the_row():
    steps, said = steps_of(1000)
    for loss, norm in ((0.5, 2.0), (math.nan, 1.0), (0.25, 3.0)):
        steps.unseen.append((steps.state.step, np.float64(loss), np.float64(norm)))
    steps.look()  # as on a GPU, several at once
    assert (steps.loss, steps.norm, steps.left_out) == (0.25, 3.0, 0)
    assert said == ["  denoiser 5: left out, as the loss is nan, the norm of the gradient 1"]
    assert steps.unseen == []


def pace_of(seconds, stage_seconds=100.0):
    pace = Pace(SimpleNamespace(seconds=stage_seconds), 0.0)
    pace.seconds.extend(seconds)
    return pace


def test_the_line_of_a_stage():
    state = SimpleNamespace(stage="denoiser", step=20, total=140)
    line = pace_of([0.5] * 30).line(state, 0.125)
    assert line == "  denoiser 20/140: 2.0 steps/s, 1 min 0 s left, loss 0.1250"


def state_of(**others):
    known = {"step": 10, "total": None, "seconds": 20.0, "corrections": 0, "discriminator": {}}
    known["params"] = SimpleNamespace(flat=np.zeros(1))
    return SimpleNamespace(**known | others)


def test_the_number_of_steps_that_the_seconds_allow():
    """The first steps, which are slower, do not count; nor does one that took long."""
    state, seconds = state_of(), [9.0] * CALIBRATION[0] + [0.5, 0.5, 30.0, 0.5, 0.5]
    pace_of(seconds).set_total(state, None, None)
    assert state.total == 10 + (100 - 20) / 0.5 and state.corrections == 0
    state.seconds = 60.0
    pace_of([9.0] * CALIBRATION[0] + [0.25] * 5).set_total(state, None, None)
    assert state.total == 10 + (100 - 60) / 0.25 and state.corrections == 1
    state.seconds = 101.0
    pace_of([0.25] * 30).set_total(state, None, None)
    assert state.total == 11  # one more, at the least


def test_on_a_gpu_steps_that_wait_for_others_count():
    """Every tenth step waits for what nine have started."""
    state = state_of(params=SimpleNamespace(flat=strict.asarray(np.zeros(1))))
    pace_of([9.0] * CALIBRATION[0] + 3 * [*[0.1] * 9, 4.1]).set_total(state, None, None)
    assert state.total == 10 + (100 - 20) / 0.5


def test_with_a_discriminator_the_later_steps_are_timed_too(monkeypatch):
    """Count the steps so far as average ones, where half take 0.5 s and half 2.5 s."""
    monkeypatch.setattr(loop, "seconds_with_discriminator", lambda *_: 2.5)
    state = state_of(discriminator={"a": 0}, config=SimpleNamespace(adversarial_start=0.5))
    pace = pace_of([0.5] * (CALIBRATION[0] + 4))
    pace.set_total(state, None, None)
    more = (CALIBRATION[0] + 4) * (1.5 - 0.5)
    assert state.seconds == 20 + more and state.corrections == len(CORRECTIONS)
    assert state.total == 10 + int((80 - more) / 1.5)


def test_the_time_of_a_step_with_the_discriminator_is_the_median_of_the_last(monkeypatch):
    """It has begun while they are timed, and not any more afterwards."""
    clock, totals, durations = [100.0], [], iter([9.0, 8.0, 7.0, 2.5, 1.0, 3.0])
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    state = state_of()

    def gradient_of(batch):
        totals.append(state.total)
        clock[0] += next(durations)
        return np.float64(batch), {}

    assert seconds_with_discriminator(state, gradient_of, 0.5) == 2.5
    assert totals == [0] * 6 and state.total is None
