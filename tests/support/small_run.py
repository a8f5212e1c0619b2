"""A run of a few steps of tiny networks, for the tests of training and of what goes around it."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tinyldm.training import loop, snapshots
from tinyldm.training import run as runs
from tinyldm.training.config import Config, Stage
from tinyldm.training.run import resume, train
from tinyldm.training.signals import Stopped
from tinyldm.training.state import state_files

STEPS = 4  # of each stage
STAGE = Stage(batch=4, rate=1e-3, warmup=2, ema=0.9, steps=STEPS)
CONFIG = Config(
    side=16,
    images=32,
    autoencoder=STAGE,
    denoiser=replace(STAGE, muon=0.01),
    vae_widths=(4, 8),
    unet_widths=(8,),
    unet_attention=(True,),
    heads=2,
    groups=4,
    text_width=8,
    text_layers=1,
    steps=2,
)


def silent(line):
    pass


def without_images(monkeypatch):
    """Training itself, for tests of it that run it often."""
    for name in ("data", "first_stage", "finished"):
        monkeypatch.setattr(snapshots, name, lambda *args: None)
    monkeypatch.setattr(snapshots, "SHARES", ())
    without_estimate(monkeypatch)


def without_estimate(monkeypatch):
    """Nothing is said of time and memory, which takes longer to measure than these runs take."""
    monkeypatch.setattr(
        runs, "estimate_run", lambda *_: SimpleNamespace(announce=lambda _: None, cannot_fit=False)
    )


def at_step(monkeypatch, number, action):
    """Do something in the middle of the `number`-th step of a run, counted over both stages."""
    train_step, calls = loop.train_step, []

    def step(state, *args):
        calls.append(state.stage)
        if len(calls) == number:
            action()
        return train_step(state, *args)

    monkeypatch.setattr(loop, "train_step", step)


def assert_goes_on_alike(config, step, folder, monkeypatch):
    """Stopped in a step and resumed, a run comes to the bytes of an undisturbed one."""
    without_images(monkeypatch)
    train(folder / "whole", config, say=silent)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            train(folder / "stopped", config, say=silent)
    resume(folder / "stopped", say=silent)
    *_, last = state_files(folder / "whole")
    for file in (last, *(folder / "whole").glob("*/*model.safetensors")):
        stopped = folder / "stopped" / file.relative_to(folder / "whole")
        assert stopped.read_bytes() == file.read_bytes(), file
