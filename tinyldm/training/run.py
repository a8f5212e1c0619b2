"""A run: begin it, resume it, and export it again."""

from pathlib import Path

from tinyldm.checkpoints.diffusers_folder import is_whole
from tinyldm.config import ConfigError, brief
from tinyldm.data.dataset import DataError
from tinyldm.lock import is_locked, locked
from tinyldm.options import path_of
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training import snapshots
from tinyldm.training.config import STAGES, Config
from tinyldm.training.estimate import estimate_run
from tinyldm.training.losses import Features
from tinyldm.training.networks import Models
from tinyldm.training.preparation import (
    Say,
    describe_data,
    fit_tokenizer,
    load_data,
    refuse_folder,
    remove,
    remove_leftovers,
    split,
)
from tinyldm.training.presets import changed, with_length
from tinyldm.training.stages import Run, begin, export
from tinyldm.training.state import (
    load_notes,
    load_state,
    save_state,
    state_files,
)


def train(
    run: str | Path,
    config: Config,
    device: str = "cpu",
    overwrite: bool = False,
    say: Say = print,
    features: Features | None = None,
) -> Pipeline:
    """Train a new run from nothing; → the finished Pipeline, which is saved in `run`.

    overwrite: replace the run that is there. say: takes lines of progress. features: the network of
    the perceptual loss, on the same device, where `config.perceptual` gives that a weight.
    Raises Stopped after a signal, Diverged, DataError, and FileExistsError rather than overwrite.
    """
    run = path_of("run", run)
    if not isinstance(config, Config):
        raise ConfigError(f"config: expected a Config, found {brief(config)}")
    refuse_folder(run, config, overwrite)
    data = load_data(config)
    training, held_out = split(data, config)
    describe_data(training, held_out, say)
    tokenizer, config = fit_tokenizer(config, data.captions, say)
    estimate = estimate_run(config, len(training), device, features)
    estimate.announce(say)
    if estimate.cannot_fit:
        raise ConfigError(f"{run}: not started: there is not enough memory")
    models = Models(config, tokenizer, features)
    state = begin(models, training, data.fingerprint(), device, say)
    with locked(run):
        refuse_folder(run, config, overwrite)  # again: somebody may have been faster
        remove_leftovers(run)
        if overwrite:
            remove(run)
        save_state(run, state)
        if data.skipped:
            report = run / "training" / "skipped.txt"
            report.write_text("".join(f"{line}\n" for line in data.skipped), encoding="utf-8")
        snapshots.data(run, training)
        say(f"training images: {run / 'samples' / 'data.png'}")
        return Run(run, state, models, training, held_out, device, say).finish()


def resume(
    run: str | Path,
    device: str = "cpu",
    minutes: float | None = None,
    say: Say = print,
    features: Features | None = None,
    **settings: object,
) -> Pipeline:
    """Resume a run as if it had never stopped; → the finished Pipeline.

    minutes: train this long from now on, instead of what was left. settings: others that may change
    (see `presets.changed`). features: the network that the run began with, if it had one.
    DataError if the images or captions are no longer the same.
    """
    run = path_of("run", run)
    if not state_files(run):
        load_notes(run)  # says that there is no run
    with locked(run):
        remove_leftovers(run)
        state = load_state(run, device, say)
        state.config = changed(state.config, **settings)
        if minutes is not None:
            left = STAGES[STAGES.index(state.stage) :]
            state.config, state.total = with_length(state.config, 60 * minutes, left), None
            state.seconds, state.corrections = 0.0, 0
        data = load_data(state.config)
        if data.fingerprint() != state.data:
            raise DataError(
                f"{state.config.data}: the {len(data):,} images and captions are no longer those "
                f"that {run} was begun with; bring them back, or begin a new run"
            )
        models = Models(state.config, state.tokenizer, features)
        training, held_out = split(data, state.config)
        say(f"resuming {state.stage}, step {state.step}")
        return Run(run, state, models, training, held_out, device, say).finish()


def rebuild(run: str | Path) -> Pipeline:
    """Export again from the newest state, after an export that was cut off."""
    with locked(run):
        if load_notes(run)["stage"] != STAGES[-1]:
            raise FileNotFoundError(
                f"{run}: has no model yet, only stage 1 has begun; tinyldm train --out {run} "
                "--resume goes on with it"
            )
        state = load_state(run)
        return export(run, state, Models(state.config, state.tokenizer))


def whole_run(run: str, say: Say) -> str:
    """Return `run`, its component folders exported again if the last export was cut off."""
    folder = path_of("run", run)
    if folder.is_dir() and state_files(run) and not is_locked(folder) and not is_whole(folder):
        if load_notes(run)["stage"] == "denoiser":
            say(f"{run}: the export is incomplete; exporting again from the state")
        rebuild(run)
    return run
