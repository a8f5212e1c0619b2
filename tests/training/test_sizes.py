"""Images that are not square, and grey ones: from a folder to a model that generates them."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from slow import mostly_slow
from small_run import CONFIG, silent, without_images

from tinyldm.config import ConfigError
from tinyldm.data.folder import load_folder
from tinyldm.data.images import from_uint8, in_channels, to_uint8
from tinyldm.models import UNet
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training import presets
from tinyldm.training import run as runs
from tinyldm.training.config import Config
from tinyldm.training.estimate import estimate_run
from tinyldm.training.preparation import load_data
from tinyldm.training.presets import changed, make_config
from tinyldm.training.state import load_state


@pytest.fixture
def photographs(tmp_path):
    """24 images of noise, 20 high and 33 wide."""
    rng = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for i in range(24):
        noise = rng.integers(0, 256, (20, 33, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photographs" / f"{i}.png")
    return tmp_path / "photographs"


def test_images_are_cropped_to_the_proportions_that_are_asked_for(photographs):
    data = load_folder(photographs, (8, 16))
    assert data.images.shape == (24, 8, 16, 3)
    names = {name: i for i, name in enumerate(data.names)}
    with Image.open(photographs / "7.png") as image:
        # 33 wide, of which 40 would be wanted for 20 high: rows are cut away on both sides.
        box, lanczos = (0, 1.75, 33, 18.25), Image.Resampling.LANCZOS
        expected = np.asarray(image.resize((16, 8), lanczos, box=box), int)
    assert abs(data.images[names["7.png"]] - expected).max() <= 1
    assert any("24 of 24 images are enlarged to 8×40" in r for r in load_folder(
        photographs, (8, 40)).notes)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    mostly_slow([{}, {"first_stage": "none"}, {"task": "inpainting"}], {"first_stage": "none"}),
)
def test_a_run_that_is_neither_square_nor_coloured(photographs, tmp_path, changes, monkeypatch):
    if changes:
        without_images(monkeypatch)
    config = dataclasses.replace(CONFIG, data=str(photographs), side=(8, 16), grey=True, **changes)
    run = tmp_path / "run"
    runs.train(run, config, say=silent)
    assert load_state(run).config == dataclasses.replace(config, guidance=1.0)  # no captions
    pipeline = Pipeline.load(run)
    assert pipeline.size == (8, 16) and pipeline.vae.config.in_channels == 1
    (generated,) = pipeline("")
    pixels = np.asarray(generated)
    assert pixels.shape == (8, 16, 3) and (pixels == pixels[..., :1]).all()
    image = Image.new("RGB", (16, 8), "red")
    assert pipeline("", image=image)[0].size == (16, 8)
    as_grey = pipeline.encode(np.asarray(image.convert("L").convert("RGB"))[None])
    np.testing.assert_allclose(pipeline.encode(np.asarray(image)[None]), as_grey, atol=0.02)
    if not changes:
        assert (run / "samples" / "samples.png").exists()


def test_grey_is_what_pillow_calls_grey():
    colours = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), np.uint8)
    grey = to_uint8(in_channels(from_uint8(colours), 1))
    expected = np.asarray(Image.fromarray(colours[0]).convert("L"), int)
    assert grey.shape == colours.shape and abs(grey[0, ..., 1].astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(in_channels(colours, 3), colours)
    config = dataclasses.replace(CONFIG, grey=True)
    data = load_data(config)
    np.testing.assert_array_equal(data.images[..., 0], data.images[..., 2])


def test_sizes_in_a_config():
    config = Config(side=(16, 32), data="folder")
    assert config.sides == (16, 32) and config.latent_shape == (8, 16, 4)
    assert config.unet_config()["sample_size"] == [8, 16]
    UNet(config.unet_config())
    assert make_config(size=(64, 64)).side == 64 and make_config(size=(64, 64)).preset == "medium"
    other = make_config(size=(32, 64), data="folder")
    assert other.side == (32, 64) and other.preset == "medium"
    with pytest.raises(ConfigError, match="shapes are drawn in squares"):
        Config(side=(16, 32))
    with pytest.raises(ConfigError, match="multiple of 8 .* found 12"):
        Config(side=(16, 12), data="folder")
    with pytest.raises(ConfigError, match="at most 1024 pixels, found 2048"):
        make_config(size=(16, 2048), data="folder")
    assert changed(config, size=(16, 32)) == config
    with pytest.raises(ConfigError, match="--size .* the run began with"):
        changed(config, size=(32, 32))


def test_memory_and_time_of_a_run_that_is_not_square():
    config = dataclasses.replace(CONFIG, side=(8, 32), data="folder", grey=True)
    assert estimate_run(config, 10, seconds=0).seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("first_stage", ["kl", "vq"])
def test_sixteen_pixels_a_side_for_each_latent(first_stage, tmp_path, monkeypatch, call):
    without_images(monkeypatch)
    monkeypatch.setitem(presets.PRESETS, "tiny", dataclasses.replace(CONFIG, side=32))
    run = tmp_path / "run"
    options = ["--preset", "tiny", "--first-stage", first_stage, "--factor", 16, "--channels", 6]
    assert call("train", "--out", run, *options).code == 0
    config, pipeline = load_state(run).config, Pipeline.load(run)
    assert config.vae_widths == (4, 8, 8, 8, 8) and config.latent_shape == (2, 2, 6)
    assert pipeline.vae.factor == config.factor == 16
    (image,) = pipeline("a large red circle on blue at the left")
    assert image.size == (32, 32)


def test_factors():
    for factor in (1, 2, 4, 8):
        config = make_config("demo", factor=factor, channels=7)
        assert config.factor == factor and config.channels == 7
        assert (config.vae_widths, config.vae_layers) == ((32,) * factor.bit_length(), 0)
    with pytest.raises(ConfigError, match="multiple of 32 .* found 48"):
        make_config("demo", factor=16, size=48)
    with pytest.raises(ConfigError, match="factor: expected 1, as there is with first stage none"):
        make_config("demo", factor=4, first_stage="none")
    assert make_config("demo", factor=1, first_stage="none").factor == 1
