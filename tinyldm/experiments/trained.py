"""The runs on which experiments work, and those that they train."""

from dataclasses import replace
from pathlib import Path

from tinyldm.data.dataset import DataError, Dataset
from tinyldm.training.config import Config
from tinyldm.training.estimate import estimate_run
from tinyldm.training.networks import Models
from tinyldm.training.preparation import Say, remove
from tinyldm.training.presets import PRESETS, with_length
from tinyldm.training.run import train
from tinyldm.training.stages import Run
from tinyldm.training.state import State, load_notes, save_state, state_files


def trained_run(run: str | Path | None, seconds: float, out: Path, say: Say) -> Path:
    """Return the folder of a run on shapes: `run`, or the demo's model trained now, in out/run.

    seconds: of training. Raises DataError for a run on other data, FileExistsError where out/run
    holds one already.
    """
    if run is None:
        run = out / "run"
        if state_files(run):
            raise FileExistsError(f"{run}: holds a run already; take it with --run {run}")
        train(run, with_length(PRESETS["demo"], seconds), say=say)
    config = load_notes(run)["config"]
    found = (config.data, config.condition, config.task, config.grey)
    if found != ("shapes", "text", "generation", False):
        raise DataError(
            f"{run}: expected a run trained on shapes, whose captions are read back by rule, "
            f"found one on {config.data} ({config.condition}, {config.task}"
            + ", grey" * config.grey
            + ")"
        )
    return Path(run)


def with_steps(config: Config, seconds: float, images: int) -> Config:
    """Return the config with as many steps in each stage as take `seconds` on this machine."""
    step_seconds = estimate_run(config, images).step_seconds
    steps = {name: max(1, int(seconds / each)) for name, each in step_seconds.items()}
    stages = {name: replace(getattr(config, name), steps=n) for name, n in steps.items()}
    return replace(config, **stages)


def new_run(
    folder: Path, state: State, models: Models, data: tuple[Dataset, Dataset], say: Say
) -> Run:
    """Return a Run that begins with this state; it replaces what its folder held."""
    remove(folder)
    save_state(folder, state)
    return Run(folder, state, models, *data, "cpu", say)
