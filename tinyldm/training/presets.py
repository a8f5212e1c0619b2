"""The presets: sizes, learning rates and lengths of the stages; and configs made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from tinyldm.config import ConfigError, meant
from tinyldm.data.images import both_sides
from tinyldm.nn.optim import DECAYS
from tinyldm.options import check_options, option, options_of
from tinyldm.training.config import (
    DEMO_AUTOENCODER,
    DEMO_DENOISER,
    IMAGES,
    LEARNT,
    MODEL,
    RESOURCES,
    STAGES,
    Config,
    Stage,
)

PRESET = "the preset's"  # the default, where the preset states it

DEMO_MODEL = {
    "vae_widths": (32, 32),
    "vae_layers": 0,
    # Ten times the usual one: latents with more noise are learnt sooner, and the decoder takes
    # those of a denoiser, which are never quite right, for what they are meant to be.
    "kl_weight": 1e-3,
    "unet_widths": (48, 64),
    "unet_attention": (False, True),
    "unet_layers": (0, 1),
    "guidance": 2.5,
    "tokens": 11,  # as many as the captions need
}
PRESETS = {
    "tiny": Config(
        preset="tiny",
        side=16,
        images=512,
        autoencoder=replace(DEMO_AUTOENCODER, steps=60, seconds=None, warmup=10),
        denoiser=replace(DEMO_DENOISER, steps=60, seconds=None, warmup=10, batch=16),
        vae_widths=(8, 16),
        unet_widths=(16, 32),
        unet_attention=(False, True),
        text_width=32,
        steps=5,
    ),
    "lesson": Config(  # the demo's networks, on images of half the size
        preset="lesson",
        side=16,
        images=8192 + 512,
        autoencoder=Stage(batch=16, rate=4e-3, muon=0.0136, warmup=20, ema=0.98, seconds=40),
        denoiser=Stage(batch=16, rate=2e-3, muon=0.014, warmup=50, ema=0.995, seconds=120),
        **DEMO_MODEL,
    ),
    "demo": Config(
        autoencoder=Stage(batch=16, rate=4e-3, muon=0.0136, warmup=20, ema=0.98, seconds=44),
        denoiser=Stage(batch=16, rate=2e-3, muon=0.014, warmup=50, ema=0.995, seconds=216),
        **DEMO_MODEL,
    ),
    "medium": Config(
        preset="medium",
        side=64,
        autoencoder=Stage(batch=16, rate=4e-3, muon=0.0136, warmup=20, ema=0.99, seconds=500),
        denoiser=Stage(batch=16, rate=2e-3, muon=0.014, warmup=50, ema=0.998, seconds=1300),
        vae_widths=(32, 32, 32),
        vae_layers=0,
        unet_widths=(64, 64, 96),
        unet_layers=(0, 1, 1),
        text_width=96,
        guidance=2.5,
    ),
    "large": Config(
        preset="large",
        side=128,
        autoencoder=Stage(batch=8, rate=4e-3, muon=0.0136, warmup=20, ema=0.99, seconds=900),
        denoiser=Stage(batch=16, rate=2e-3, muon=0.014, warmup=50, ema=0.998, seconds=1800),
        vae_widths=(32, 32, 32, 32),
        vae_layers=0,
        latent_channels=8,
        unet_widths=(64, 64, 128),
        unet_layers=(0, 1, 1),
        text_width=128,
        guidance=2.5,
    ),
}
# Steps of the demo's stages after which 95 % of the captions or more are right in all attributes:
# 98.8 % after 518 + 1,837 of them, and 98.0 % where colour and shape were held out as a pair.
ENOUGH = {"autoencoder": 500, "denoiser": 1800}
MAY_CHANGE = {"keep", "data", "skip_bad", "checkpointing"}  # when a run is resumed
LARGEST_SIDE = 1024  # pixels of a side
FOR_TESTS = "tiny"  # too small to be chosen by size


@dataclass(frozen=True)
class NewRun:
    """Options of a new run besides the fields of its Config; None is the preset's value."""

    preset: str | None = option(
        "preset: tiny (16 px, seconds, to try things out), lesson (16 px, 3 minutes), "
        "demo (32 px, 5 minutes), medium (64 px, 30 minutes) or large (128 px, 45 minutes)", None,
        choices=PRESETS, group=MODEL, default_text="the smallest for --size, else demo",
    )  # fmt: skip
    size: int | tuple[int, int] | None = option(
        "size of the images in pixels, S or HEIGHTxWIDTH; each is cropped in its middle and "
        "resized", None, group=IMAGES, default_text=PRESET,
    )  # fmt: skip
    factor: int | None = option(
        "downsampling factor of the first stage: 1, 2, 4, 8 or 16", None,
        choices=(1, 2, 4, 8, 16), group=MODEL, metavar="F", default_text=PRESET,
    )  # fmt: skip
    channels: int | None = option(
        "number of latent channels", None, least=1, most=64, group=MODEL, metavar="C",
        default_text=PRESET,
    )  # fmt: skip
    decay: str | None = option(
        f"decay of the learning rate: {', '.join(DECAYS)}", None, choices=DECAYS, group=LEARNT,
        default_text=next(iter(DECAYS)),
    )  # fmt: skip
    minutes: float | None = option(
        "minutes of training; with --resume, from now on", None, least=0.01, most=100_000,
        group=RESOURCES, default_text=PRESET,
    )  # fmt: skip
    accumulate: int | None = option(
        "number of parts in which each batch is worked through, for less memory", None, least=1,
        most=1024, group=RESOURCES, metavar="N", default_text="1",
    )  # fmt: skip


def make_config(preset: str | None = None, **options: object) -> Config:
    """Return the config of a new run.

    options: of NewRun, and fields of Config. The preset is by default the smallest for images of
    `size`, which is pixels, of a square or (height, width); `minutes` are shared between the stages
    as the preset does.
    ConfigError for an unknown preset, or a size that does not divide.
    """
    asked = {name: options.pop(name) for name in options_of(NewRun) if name in options}
    known = [field.name for field in fields(Config)]
    for name in options:
        if name not in known:
            hint = meant(name, known)
            raise ConfigError(f"{name}: not a field of Config, nor of NewRun{hint}")
    new = NewRun(preset, **asked)
    check_options(new, ConfigError)
    if preset is None:
        by_side = sorted((c.side, name) for name, c in PRESETS.items() if name != FOR_TESTS)
        wanted = max(both_sides(new.size or PRESETS["demo"].side))
        fitting = [name for side, name in by_side if side >= wanted]
        preset = fitting[0] if fitting else by_side[-1][1]
    like = PRESETS[preset]
    if new.factor not in (None, like.factor):
        widths, levels = like.vae_widths, new.factor.bit_length()
        options["vae_widths"] = (*widths, *[widths[-1]] * levels)[:levels]
    if new.channels is not None:
        options["latent_channels"] = new.channels
    if new.size is not None:
        if max(both_sides(new.size)) > LARGEST_SIDE:
            raise ConfigError(
                f"size: expected at most {LARGEST_SIDE} pixels, found {max(both_sides(new.size))}"
            )
        options["side"] = _one_if_equal(new.size)
    config = replace(PRESETS[preset], **options)
    for name in ("factor", "channels"):
        wanted, there = getattr(new, name), getattr(config, name)
        if wanted not in (None, there):
            raise ConfigError(
                f"{name}: expected {there}, as there is with first stage {config.first_stage}, "
                f"found {wanted}"
            )
    given = {"parts": new.accumulate, "decay": new.decay}
    given = {name: value for name, value in given.items() if value is not None}
    config = replace(config, **{name: replace(getattr(config, name), **given) for name in STAGES})
    return config if new.minutes is None else with_length(config, 60 * new.minutes)


def _one_if_equal(size):
    height, width = both_sides(size)
    return height if height == width else (height, width)


def with_length(config: Config, seconds: float, stages: Sequence[str] = STAGES) -> Config:
    """Return a config whose `stages` take `seconds` together, in the proportion they have in it."""
    parts = {name: getattr(config, name) for name in stages}
    lengths = {name: part.seconds or part.steps for name, part in parts.items()}
    whole = sum(lengths.values())
    parts = {
        name: replace(part, steps=None, seconds=seconds * lengths[name] / whole)
        for name, part in parts.items()
    }
    return replace(config, **parts)


def is_demo(config: Config) -> bool:
    """Return whether a config is the demo's, whatever its seed and its minutes."""
    demo = PRESETS["demo"]
    timed = all(getattr(config, name).seconds is not None for name in STAGES)
    alike = {
        name: replace(getattr(config, name), seconds=getattr(demo, name).seconds) for name in STAGES
    }
    return timed and replace(config, seed=demo.seed, keep=demo.keep, **alike) == demo


def changed(config: Config, **settings: object) -> Config:
    """Return the config of a resumed run with other settings; those that are None stay the same.

    keep, data (if the images have moved), skip_bad and checkpointing may change. ConfigError for
    others that differ, such as size or seed: the result would not be the run that was begun.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if "size" in given:
        settings["size"] = given["size"] = _one_if_equal(given["size"])
    began = vars(config) | {"size": config.side}
    for name in [name for name in given if name not in MAY_CHANGE]:
        if given.pop(name) != began[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} {settings[name]}: the run began with {began[name]}, "
                "which stays; what may change on --resume: --minutes, --keep, --device, "
                "--skip-bad, --checkpointing, and --data if the same images have moved"
            )
    return replace(config, **given)
