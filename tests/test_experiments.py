"""The experiments run to their end, at a size that shows nothing, and write what they promise."""

import dataclasses
import json
import math

import pytest
from PIL import Image

from tinyldm.experiments import latent_vs_pixel
from tinyldm.training import rehearsal
from tinyldm.training.presets import Stage

STAGE = Stage(batch=4, rate=1e-3, warmup=2, ema=0.9, steps=1)
KEYS = {
    "f", "seconds", "steps", "train_images_per_s", "sample_images_per_s", "accuracy_all", "psnr",
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    base = dataclasses.replace(
        latent_vs_pixel.BASE, side=16, pictures=300, autoencoder=STAGE, denoiser=STAGE,
        unet_widths=(8,), unet_attention=(True,), groups=4, heads=2, text_width=8, steps=2,
    )  # fmt: skip
    monkeypatch.setattr(latent_vs_pixel, "BASE", base)
    monkeypatch.setattr(latent_vs_pixel, "WIDTHS", (4, 4, 8, 8))
    monkeypatch.setattr(latent_vs_pixel, "CAPTIONS", (9, 9))
    monkeypatch.setattr(latent_vs_pixel, "LONG_ENOUGH", 0.0)
    monkeypatch.setattr(rehearsal, "_steps", lambda stage, seconds: 4)


def test_latent_vs_pixel(small, call, tmp_path):
    result = call("experiment", "latent-vs-pixel", "--seconds", 1, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["f"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        assert row.keys() >= KEYS and all(math.isfinite(row[key]) for key in KEYS)
        assert row["steps"] == 4 and row["seconds"] > 0
        assert math.isclose(row["train_images_per_s"], 4 * 4 / row["seconds"])
        assert row["sample_images_per_s"] > 0 and 0 <= row["accuracy_all"] <= 1
    assert rows[0]["psnr"] == 100 and all(row["psnr"] < 100 for row in rows[1:])
    assert rows[0]["first_stage_seconds"] == 0 < rows[1]["first_stage_seconds"]
    for row in rows[1:]:
        assert row["equal_steps"]["steps"] == rows[0]["steps"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert result.out == table and len(table.splitlines()) == 2 + 4
    assert "| 1 | 4 | " in table and "(1.0×)" in table
    for name in ("quality.png", "samples.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 100


def test_mistakes(call, tmp_path):
    result = call("experiment", "latent-vs-pixels", "--out", tmp_path)
    assert result.code == 2 and "found 'latent-vs-pixels'" in result.err
    assert call("experiment", "latent-vs-pixel").code == 2
    (tmp_path / "file").write_text("in the way")
    result = call("experiment", "latent-vs-pixel", "--out", tmp_path / "file")
    assert result.code == 2 and "expected a folder, or nothing, found a file" in result.err


def test_a_clock_runs_when_it_is_told_to(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(latent_vs_pixel.time, "monotonic", lambda: now[0])
    clock = latent_vs_pixel.Clock()
    assert clock.read() == 0
    clock.go()
    now[0] += 3
    assert clock.read() == 3
    clock.stop()
    now[0] += 50
    assert clock.read() == 3
    clock.go()
    now[0] += 2
    assert clock.read() == 5
