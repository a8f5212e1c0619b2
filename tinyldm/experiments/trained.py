"""The trained run on which an experiment works."""

from pathlib import Path

from tinyldm.data.dataset import DataError
from tinyldm.training.preparation import Say
from tinyldm.training.presets import PRESETS, with_length
from tinyldm.training.run import train
from tinyldm.training.state import load_notes, state_files


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
