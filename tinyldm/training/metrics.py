"""The metrics log of a run, `training/metrics.jsonl`: a line of JSON for a step."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

from tinyldm.backend import Array
from tinyldm.evaluation.metrics import BANDS
from tinyldm.files import replacing
from tinyldm.training.config import STAGES
from tinyldm.training.state import State

LARGEST = 1e38  # of numbers in a line: curves are drawn of them


class Diverged(RuntimeError):
    """The loss is no longer finite. The last state was saved before that."""


def finite(number: float | Array, state: State) -> float:
    """Return a value of the last step as a float. Raises Diverged where it is not finite."""
    number = float(number)
    if not math.isfinite(number):
        raise diverged(state, f"loss or gradient is {number}")
    return number


def diverged(state: State, what: str) -> Diverged:
    """Make the error that says so, and what to do."""
    return Diverged(
        f"stage {state.stage}, step {state.step}: {what}. The last saved state is intact; start "
        "again with another --seed, or in Python with a lower learning rate"
    )


class MetricsLog:
    """Metrics log: `with MetricsLog(folder, state) as log:` adds lines about the present step."""

    def __init__(self, folder: str | Path, state: State):
        self.file, self.state = Path(folder) / "training" / "metrics.jsonl", state

    def __enter__(self) -> "MetricsLog":
        forget_metrics_after(self.file, self.state)
        self.stream = open(self.file, "a", 1, "utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, numbers: dict[str, float]) -> None:
        """Write a line for the present step."""
        line = {"stage": self.state.stage, "step": self.state.step} | numbers
        self.stream.write(json.dumps(line | {"time": round(time.time(), 2)}) + "\n")


def read_metrics(file: Path) -> list[dict]:
    """Read the lines of a log, and pass over what is none: a file may be missing, or edited."""
    entries = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            entry = json.loads(line)
            bands = entry.get("by_noise", [0] * BANDS)
            numbers = [
                *bands,
                *(entry.get(key, 0) for key in ("loss", "validation")),
                *entry.get("right", {}).values(),
                entry["step"],
            ]
            drawn = len(bands) == BANDS and all(abs(number) <= LARGEST for number in numbers)
            if drawn and entry["stage"] in STAGES:
                entries.append(entry)
    return entries


def forget_metrics_after(file: Path, state: State) -> None:
    """Drop the lines of steps that will be done again, and what is not a line of this log."""
    if not os.path.lexists(file):
        return
    kept = []
    for entry in read_metrics(file):
        before = STAGES.index(entry["stage"]) - STAGES.index(state.stage)
        if before < 0 or (before == 0 and entry["step"] <= state.step):
            kept.append(json.dumps(entry) + "\n")
    with replacing(file) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
