"""What a run is made of: presets, sizes, lengths, and what may change when it goes on."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.config import ConfigError
from tinyldm.diffusion.schedule import Schedule
from tinyldm.models import AutoencoderKL, UNet
from tinyldm.training.config import SCHEDULES, STAGES, Config, Stage
from tinyldm.training.presets import PRESETS, changed, make_config, with_length


def seconds(config):
    return [getattr(config, name).seconds for name in STAGES]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_models(name):
    config = make_config(name)
    assert config.preset == name
    vae, unet = AutoencoderKL(config.vae_config()), UNet(config.unet_config())
    assert config.side % (vae.factor * 2 ** (len(config.unet_widths) - 1)) == 0
    assert vae.shapes() and unet.shapes()
    assert config == Config.from_json(dataclasses.asdict(config))


@pytest.mark.parametrize(
    ("size", "preset"),
    [(None, "demo"), (8, "lesson"), (16, "lesson"), (32, "demo"), (48, "medium"),
     (64, "medium"), (96, "large"), (128, "large"), (256, "large")],
)  # fmt: skip
def test_the_size_chooses_the_preset(size, preset):
    config = make_config(size=size)
    assert (config.preset, config.side) == (preset, size or 32)


def test_what_is_given_goes_before_the_preset():
    config = make_config("demo", size=64, seed=3, data="images", skip_bad=True)
    assert (config.preset, config.side, config.seed, config.data) == ("demo", 64, 3, "images")
    assert config.skip_bad and config.unet_widths == PRESETS["demo"].unet_widths


@given(st.integers(1, 1024), st.sampled_from(sorted(PRESETS)))
def test_a_size_divides_or_the_nearest_are_named(size, name):
    factor = 2 ** (len(PRESETS[name].vae_widths) + len(PRESETS[name].unet_widths) - 2)
    if size % factor == 0:
        assert make_config(name, size=size).side == size
        return
    with pytest.raises(ConfigError, match=f"multiple of {factor} .*found {size};") as caught:
        make_config(name, size=size)
    below, above = (int(word) for word in str(caught.value).rsplit("are ")[1].split(" and "))
    assert below % factor == above % factor == 0 < below and above - below == factor
    assert below < size < above or size < below == factor


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"side": "64"}, "config: side: expected an integer .*, found '64'"),
        ({"side": (16, 16, 16)}, r"side: expected an integer, or two, found \(16, 16, 16\)"),
        ({"unet_widths": ()}, "unet_widths: expected a level or more, found none"),
        ({"guidance": "x"}, "config: guidance: expected a number, found 'x'"),
        ({"flip": "no"}, "flip: expected true or false, found 'no'"),
        ({"held_out": -1}, "held_out: expected 0…1, found -1"),
        ({"images": 0}, "config: images: expected an integer of 1 to .*, found 0"),
        ({"data": ""}, "data: expected the name of a folder, found ''"),
        ({"data": b"images"}, "data: expected a text, found b'images'"),
        ({"denoiser": 5}, "config: denoiser: expected a Stage, found 5"),
    ],
)
def test_a_config_that_cannot_be(settings, says):
    with pytest.raises(ConfigError, match=says):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch": 0}, "stage: batch: expected an integer of 1 to .*, found 0"),
        ({"rate": "x"}, "stage: rate: expected a number, found 'x'"),
        ({"rate": float("nan")}, "stage: rate: expected a number, found nan"),
        ({"ema": 1.5}, "ema: expected 0…1, found 1.5"),
        ({"decay": ["cosine"]}, "stage: decay: expected a word, found"),
    ],
)
def test_a_stage_that_cannot_be(settings, says):
    with pytest.raises(ConfigError, match=says):
        Stage(**({"batch": 4, "rate": 1e-3, "warmup": 0, "ema": 0.9} | settings))


@pytest.mark.parametrize("size", ["64", 64.0, (64,) * 3, None.__class__])
def test_a_size_is_an_integer_or_two(size):
    with pytest.raises(ConfigError, match="^size: expected an integer, or two, found "):
        make_config(size=size)


def test_a_path_is_as_good_as_its_name():
    assert Config(data=Path("images")) == Config(data="images")


def test_a_name_that_no_config_has():
    with pytest.raises(ConfigError, match="^foo: not a field of Config, nor of NewRun"):
        make_config(foo=1)


def test_a_preset_that_there_is_not():
    with pytest.raises(
        ConfigError, match="tiny, lesson, demo, medium or large, found 'dmeo'; did you mea"
    ):
        make_config("dmeo")


@pytest.mark.parametrize("name", PRESETS)
def test_minutes_are_shared_as_the_preset_does(name):
    first, second = seconds(make_config(name, minutes=10))
    assert first + second == pytest.approx(600)
    stages = PRESETS[name].autoencoder, PRESETS[name].denoiser
    before = [stage.seconds or stage.steps for stage in stages]
    assert first / second == pytest.approx(before[0] / before[1])
    assert make_config(name, minutes=10).autoencoder.steps is None


def test_the_rest_of_a_run_can_get_all_the_time():
    assert seconds(with_length(make_config("demo"), 100, ["denoiser"])) == [44, 100]


def test_what_may_change_when_a_run_goes_on():
    config = make_config("demo", seed=3)
    assert changed(config) == changed(config, data=None, seed=None) == config
    assert changed(config, seed=3, size=32, preset="demo") == config
    assert changed(config, keep=5, data="moved").keep == 5
    assert changed(config, data="moved").data == "moved"


@pytest.mark.parametrize("setting", [{"seed": 4}, {"size": 64}, {"preset": "tiny"}])
def test_what_may_not_change(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"--{name} {value}: the run began with .*may change"):
        changed(make_config("demo", seed=3), **setting)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_of_the_scheduler_config(name):
    config = make_config("demo", schedule=name).scheduler_config()
    assert config.items() >= SCHEDULES[name].items() and config["prediction_type"] == "v_prediction"
    last = Schedule(config).alphas_bar[-1]
    assert (last == 0) == (name == "zero_snr") and last < 0.005


def test_a_run_of_before_there_was_a_choice_has_the_linear_schedule():
    content = dataclasses.asdict(PRESETS["demo"])
    del content["schedule"]
    assert Config.from_json(content).scheduler_config()["beta_schedule"] == "linear"


def test_schedules_that_cannot_be():
    with pytest.raises(ConfigError, match="schedule: .*zero_snr, found 'cosin'; did you mean 'cos"):
        make_config("demo", schedule="cosin")
    with pytest.raises(ConfigError, match="ε does not lead back; take v_prediction"):
        make_config("demo", schedule="zero_snr", prediction="epsilon")


def test_states_written_under_older_names_load():
    content = dataclasses.asdict(PRESETS["tiny"])
    content["pictures"] = content.pop("images")
    assert Config.from_json(content) == PRESETS["tiny"]
