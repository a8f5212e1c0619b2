"""The experiments run to their end, at a size that shows nothing, and write what they promise."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tinyldm.checkpoints.safetensors import load_metadata, load_weights, save_weights
from tinyldm.config import ConfigError
from tinyldm.diffusion import SAMPLERS
from tinyldm.experiments import guidance, latent_vs_pixel, samplers, schedules, scoring, trained
from tinyldm.training import presets, snapshots
from tinyldm.training import run as runs
from tinyldm.training.config import Stage
from tinyldm.training.signals import Interruptible, Stopped
from tinyldm.training.state import state_files

STAGE = Stage(batch=4, rate=1e-3, warmup=2, ema=0.9, steps=1)
SMALL = {
    "side": 16, "images": 300, "autoencoder": STAGE, "denoiser": STAGE, "unet_widths": (8,),
    "unet_attention": (True,), "groups": 4, "heads": 2, "text_width": 8, "steps": 2,
}  # fmt: skip
TINY = dataclasses.replace(presets.PRESETS["tiny"], **SMALL | {"images": 30}, vae_widths=(4, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run trained on shapes, as little as can be."""
    run = tmp_path_factory.mktemp("experiments") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("data", "first_stage", "finished"):
            patch.setattr(snapshots, name, lambda *args: None)
        runs.train(run, TINY, say=lambda line: None)
    return run


@pytest.fixture
def experiment(call, tmp_path):
    """`experiment(*arguments, images=names) → its rows`: they are those of its table, too."""

    def run(*arguments, images):
        out = tmp_path / "out"
        result = call("experiment", *arguments, "--out", out)
        assert result.code == 0, result.err
        rows = json.loads((out / "results.json").read_text())
        assert result.out == (out / "table.md").read_text()
        assert len(result.out.splitlines()) == 2 + len(rows)
        for name in images:
            with Image.open(out / name) as image:
                assert min(image.size) > 100
        return rows

    return run


@pytest.fixture
def small(monkeypatch):
    base = dataclasses.replace(latent_vs_pixel.BASE, unet_layers=1, **SMALL)
    for name, value in {"BASE": base, "WIDTHS": (4, 4, 4), "LONG_ENOUGH": 0.0}.items():
        monkeypatch.setattr(latent_vs_pixel, name, value)
    steps = SimpleNamespace(step_seconds={"autoencoder": 0.5, "denoiser": 0.25})
    monkeypatch.setattr(trained, "estimate_run", lambda *args: steps)


@pytest.mark.slow
def test_latent_vs_pixel(small, experiment, tmp_path):
    asked = "--seconds", 1, "--captions", 9
    rows = experiment("latent-vs-pixel", *asked, images=("quality.png", "samples.png"))
    assert [row["f"] for row in rows] == [1, 2, 4]
    for row in rows:
        assert row.keys() == latent_vs_pixel.COLUMNS.keys()
        assert row["steps"] == 4 and row["seconds"] > 0 and row["sample_images_per_s"] > 0
        assert 0 <= row["accuracy_all"] <= 1 and 0 <= row["drawing"] < 255
        assert math.isclose(row["train_speedup"], rows[0]["seconds"] / row["seconds"])
        speed, of_pixels = (one["sample_images_per_s"] for one in (row, rows[0]))
        assert math.isclose(row["sample_speedup"], speed / of_pixels)
    assert rows[0]["psnr"] is rows[0]["first_stage_seconds"] is None
    assert all(0 < row["psnr"] < 100 and row["first_stage_seconds"] > 0 for row in rows[1:])
    assert "| 1 | 4 | – | " in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_guidance(folder, experiment, monkeypatch):
    for name, value in {"GUIDANCE": (1, 2, 8), "RESCALED": (8,)}.items():
        monkeypatch.setattr(guidance, name, value)
    asked = ("--run", folder, "--captions", 8)
    rows = experiment("guidance", *asked, images=("guidance.png", "samples.png"))
    settings = [(row["guidance"], row["rescale"]) for row in rows]
    assert settings == [(None, None), (1, 0), (2, 0), (8, 0), (8, 0.7)]
    for row in rows:
        assert row.keys() == {*guidance.COLUMNS, "guidance", "rescale"}
        assert all(0 <= row[key] <= 1 for key in ("accuracy_all", "precision", "recall"))
        assert 0 <= row["saturated"] <= 1 and 0 <= row["frechet"] < math.inf
    assert len({row["frechet"] for row in rows}) == len(rows)


def test_true_images_are_drawn_again():
    _, captions = guidance.make_shapes(20, 16, guidance.SEED)
    first, second = (guidance.drawn_again(captions, 16) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    truth, _ = guidance.make_shapes(20, 16, guidance.SEED)
    assert (first != truth).any(axis=(1, 2, 3)).all()
    # At 16 pixels the reader takes some small shapes for others.
    assert scoring.score(first, captions)["background"] == 1


@pytest.mark.slow
def test_samplers(folder, experiment, monkeypatch):
    some = ("ddpm", "ddim", "pndm", "heun")
    small = {
        "CAPTIONS": 3,
        "STEPS": (3, 5),
        "REFERENCE": 5,
        "SAMPLERS": {name: SAMPLERS[name] for name in some},
    }
    for name, value in small.items():
        monkeypatch.setattr(samplers, name, value)
    images = "accuracy.png", "distance.png", "samples.png"
    rows = experiment("samplers", "--run", folder, images=images)
    assert [(row["sampler"], row["steps"]) for row in rows] == [
        (sampler, steps) for sampler in some for steps in (3, 5)
    ]
    for row in rows:
        assert row.keys() == samplers.COLUMNS.keys()
        assert row["seconds"] > 0 and 0 <= row["accuracy_all"] <= 1
        assert (row["distance"] is None) == SAMPLERS[row["sampler"]].needs_noise
        steps = row["steps"]
        predictions = {
            "heun": 2 * steps - 1,
            "pndm": steps + 1 if steps < 4 else steps + 9,  # three Runge-Kutta steps of four
        }.get(row["sampler"], steps)
        assert row["network_calls"] == 2 * predictions  # without the caption, and with it
    distance = {(row["sampler"], row["steps"]): row["distance"] for row in rows}
    assert distance["ddim", 5] == 0 < distance["ddim", 3]


@pytest.mark.slow
def test_a_sampler_that_does_not_know_the_schedule_is_left_out(folder, experiment, monkeypatch):
    generate = samplers.generate

    def generated(pipeline, captions, sampler, **options):
        if sampler == "pndm":
            raise ConfigError("of another schedule")
        return generate(pipeline, captions, sampler=sampler, **options)

    small = {"CAPTIONS": 3, "STEPS": (3, 5), "REFERENCE": 5, "generate": generated}
    small["SAMPLERS"] = {name: SAMPLERS[name] for name in ("pndm", "ddim")}
    for name, value in small.items():
        monkeypatch.setattr(samplers, name, value)
    images = "accuracy.png", "distance.png", "samples.png"
    rows = experiment("samplers", "--run", folder, images=images)
    assert [row["sampler"] for row in rows] == ["ddim", "ddim"]


@pytest.mark.slow
def test_without_guidance_a_prediction_is_one_call(folder):
    pipeline = samplers.Counting.load(folder)
    pipeline(["a", "b", "c"], steps=4, guidance=1)
    assert pipeline.seen == 3 * 4


@pytest.mark.slow
def test_schedules(experiment, monkeypatch, tmp_path, call):
    trials = [
        ("zero_snr", "v_prediction", "simple"), ("linear", "epsilon", "min-snr"),
        ("cosine", "sample", "simple"),
    ]  # fmt: skip
    for name, value in {"BASE": TINY, "CAPTIONS": 9, "TRIALS": trials}.items():
        monkeypatch.setattr(schedules, name, value)
    steps = SimpleNamespace(step_seconds={"autoencoder": 0.5, "denoiser": 0.5})
    monkeypatch.setattr(trained, "estimate_run", lambda *args: steps)
    names = "signal-to-noise.png", "samples.png"
    rows = experiment("schedules", "--seconds", 1, images=names)
    assert [(row["schedule"], row["prediction"], row["weighting"]) for row in rows] == trials
    for row in rows:
        assert row.keys() == schedules.COLUMNS.keys()
        assert row["steps"] == 2 and row["seconds"] > 0
        assert 0 <= row["accuracy_seen"] <= 1 and 0 <= row["accuracy_held_out"] <= 1
    # Each is a run of its own, on the same first stage.
    folders = [tmp_path / "out" / "-".join(trial) for trial in trials]
    first, *others = (load_weights(state_files(one)[-1]) for one in folders)
    for other in others:
        assert first.keys() == other.keys()
        for name in first:
            equal = np.array_equal(first[name], other[name])
            assert equal or not name.startswith("first_stage/")
    scheduler = json.loads((folders[0] / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["rescale_betas_zero_snr"] and scheduler["timestep_spacing"] == "trailing"
    generated = call("sample", folders[0], "a small red circle", "-o", tmp_path / "image.png")
    assert generated.code == 0, generated.err


def test_every_trial_is_a_config():
    names = ("schedule", "prediction", "weighting")
    assert len(set(schedules.TRIALS)) == len(schedules.TRIALS) == 12
    for trial in schedules.TRIALS:
        dataclasses.replace(schedules.BASE, **dict(zip(names, trial, strict=True)))


def test_without_a_run_the_demo_is_trained(folder, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(trained, "train", lambda run, config, say: asked.append((run, config)))
    monkeypatch.setattr(trained, "load_notes", lambda run: {"config": TINY})
    assert trained.trained_run(None, 100, tmp_path, print) == tmp_path / "run"
    ((run, config),) = asked
    assert run == tmp_path / "run" and config.preset == "demo"
    assert config.autoencoder.seconds + config.denoiser.seconds == pytest.approx(100)
    with pytest.raises(FileExistsError, match="holds a run already; take it with --run"):
        trained.trained_run(None, 100, folder.parent, print)
    assert len(asked) == 1


def test_a_report_is_whole_after_every_row(tmp_path):
    stop = Interruptible()
    report = scoring.Report(tmp_path, {"a": ("first", "d"), "b": ("second", ".0%")}, stop)
    report.add({"a": 1, "b": 0.5, "c": "not shown"})
    assert json.loads((tmp_path / "results.json").read_text()) == report.rows
    stop.number = 15
    with pytest.raises(Stopped):
        report.add({"a": 2, "b": None})
    assert json.loads((tmp_path / "results.json").read_text()) == report.rows
    table = "| first | second |\n| --- | --- |\n| 1 | 50% |\n| 2 | – |\n"
    assert (tmp_path / "table.md").read_text() == table


def test_mistakes(call, tmp_path):
    result = call("experiment", "latent-vs-pixels", "--out", tmp_path)
    assert result.code == 2 and "found 'latent-vs-pixels'" in result.err
    assert call("experiment", "latent-vs-pixel").code == 2
    (tmp_path / "file").write_text("in the way")
    result = call("experiment", "latent-vs-pixel", "--out", tmp_path / "file")
    assert result.code == 2 and "expected a folder, or nothing, found a file" in result.err


def not_of_shapes(run):
    """Make a run look as if it had been trained on a folder of images."""
    file = state_files(run)[-1]
    notes = json.loads(load_metadata(file)["tinyldm"])
    notes["config"]["data"] = "images"
    save_weights(file, load_weights(file), {"tinyldm": json.dumps(notes)})


@pytest.mark.parametrize("name", ["guidance", "samplers", "schedules"])
def test_runs_that_it_cannot_look_at(name, folder, call, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    not_of_shapes(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    told = {
        "run": "expected a run trained on shapes, whose captions are read back by rule, found one "
        "on images",
        "empty": "holds no run",
        "missing": "holds no run",
    }
    for run, line in told.items():
        result = call("experiment", name, "--run", tmp_path / run, "--out", tmp_path / "out")
        line = (
            "--run: schedules trains its own model; leave it out" if name == "schedules" else line
        )
        assert result.code == 2 and line in result.err and result.err.count("\n") == 1
        assert result.out == "" and not (tmp_path / "out").exists()
