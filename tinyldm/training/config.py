"""The config of a run: everything that it depends on, and the configs of its networks."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from tinyldm.checkpoints.components import DIFFUSERS_VERSION
from tinyldm.config import ConfigError, Kind, brief, check_kind, meant, unknown
from tinyldm.data.images import both_sides
from tinyldm.diffusion.loss import WEIGHTINGS
from tinyldm.diffusion.schedule import PREDICTIONS, Schedule
from tinyldm.models import ClassNames, Tokenizer
from tinyldm.models.discriminator import PatchDiscriminator
from tinyldm.nn.optim import DECAYS
from tinyldm.options import check_options, option, options_of
from tinyldm.sampling.tasks import TASKS, concat_channels, times_larger

STAGES = ("autoencoder", "denoiser")
DISCRIMINATED = 16  # pixels of a side, at least, for the discriminator's convolutions
CONDITIONS = ("text", "class-token", "class-time", "none")
FIRST_STAGES = {"kl": "AutoencoderKL", "vq": "VQModel", "none": "IdentityFirstStage"}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {  # of noise: name → keys of diffusers' scheduler config
    # Noisier than Stable Diffusion's schedule, whose last steps still show where a large shape on
    # plain ground is: the network would never need to read that in the caption.
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": STABLE_DIFFUSION,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    # Training ends at noise alone, so sampling must begin there (Lin et al. 2023, section 3.3).
    "zero_snr": STABLE_DIFFUSION | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


KINDS: dict[str, Kind] = {  # of fields whose type does not show it
    "side": int | list[int],
    "vae_widths": list[int],
    "unet_widths": list[int],
    "unet_attention": list[bool],
    "unet_layers": int | list[int],
}
SHARES = ("held_out", "adversarial_start", "caption_dropout", "ema")
MAY_BE_0 = {"side", "kl_weight", "perceptual", "vae_layers", "unet_layers", "guidance", "warmup"}
MAY_BE_0 |= {*SHARES, "text_layers"}

# The groups of options on the command line.
IMAGES, MODEL, LEARNT = "the images", "the model", "what is learnt"
RESOURCES = "time and memory"


def choice(help: str, choices: Iterable[str], group: str) -> Any:
    """Make an option that is one of some words, the first by default."""
    words = tuple(choices)
    return option(f"{help}: {', '.join(words)}", words[0], choices=words, group=group)


def _check_fields(what, instance):
    """Raise ConfigError for the first field that is not as expected; options are checked apart."""
    for name in [
        one.name for one in fields(instance) if one.name not in options_of(type(instance))
    ]:
        value, kind = getattr(instance, name), type(instance).__annotations__[name]
        check_kind(what, name, value, KINDS.get(name, kind), int(name not in MAY_BE_0))
        if name in SHARES and not 0 <= value <= 1:
            raise ConfigError(f"{name}: expected 0…1, found {value}")


def _known(what, cls, content):
    """Return the fields of a dataclass from JSON. ConfigError for anything else."""
    check_kind(what, "content", content, dict)
    names = {one.name for one in fields(cls)}
    for key in content:
        if key not in names:
            raise ConfigError(f"{what}: unknown key {brief(key)}{meant(key, names)}")
    return content


@dataclass(frozen=True)
class Stage:
    """One stage of training. Its length is `steps`, or what fits into `seconds` on this machine."""

    batch: int
    rate: float  # peak of the learning rate
    warmup: int  # steps
    ema: float  # limit of the decay of the moving average
    steps: int | None = None
    seconds: float | None = None
    parts: int = 1  # of a batch, one after the other, for less memory
    decay: str = "cosine"  # of the learning rate after its peak, or "linear" or "constant"
    muon: float | None = None  # peak size of Muon's step; None trains all by AdamW

    def __post_init__(self):
        _check_fields("stage", self)
        if self.decay not in DECAYS:
            raise ConfigError(f"decay: {unknown(self.decay, DECAYS)}")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. It is stored in the run's state."""

    preset: str = "demo"
    data: str = option(
        "folder of images, IDX (MNIST), CIFAR-10's .bin or .npz", "shapes", group=IMAGES,
        metavar="FOLDER", default_text="shapes, drawn here",
    )  # fmt: skip
    side: int | tuple[int, int] = 32  # pixels; two are height and width
    grey: bool = option("train on one channel, the brightness of the images", False, group=IMAGES)
    images: int = 20_512  # to draw, for shapes
    flip: bool = option(
        "train on mirror images, too (not where captions say left and right)", False, group=IMAGES
    )
    held_out: float = 0.05  # share of the images that validate and are never trained on
    skip_bad: bool = option(
        "leave out files that cannot be read, and name them", False, group=IMAGES
    )
    keep: int = option("number of states on disk, the last ones", 2, least=1, most=1000)
    seed: int = option("seed of everything that is drawn at random", 0, least=0)
    autoencoder: Stage = field(default_factory=lambda: DEMO_AUTOENCODER)
    denoiser: Stage = field(default_factory=lambda: DEMO_DENOISER)
    first_stage: str = choice(
        "first stage, with Gaussian latents, a codebook, or none for diffusion in pixels",
        FIRST_STAGES, group=MODEL,
    )  # fmt: skip
    codes: int = 256  # of the codebook
    kl_weight: float = option(
        "weight of the KL divergence per latent value, beside the squared error", 1e-4, least=0,
        most=1000, group=LEARNT, metavar="WEIGHT", default_text="that of the preset")  # fmt: skip
    perceptual: float = 0.0  # weight of the perceptual loss, on a network given in Python
    adversarial: float = option(
        "weight of a discriminator in the second half of stage 1", 0.0, least=0, most=1000,
        group=LEARNT, metavar="WEIGHT",
    )  # fmt: skip
    adversarial_start: float = 0.5  # share of the stage's steps after which it begins
    task: str = choice("task, which says what is concatenated to the latents", TASKS, group=MODEL)
    condition: str = choice(
        "condition: captions, classes as a token or with the time step, or none", CONDITIONS,
        group=MODEL,
    )  # fmt: skip
    caption_dropout: float = option("share of captions dropped, for classifier-free guidance",
        0.1, least=0, most=1, group=LEARNT, metavar="SHARE")  # fmt: skip
    checkpointing: bool = option(
        "compute activations again in the backward pass, for less memory", False, group=RESOURCES
    )
    weighting: str = choice("weighting of the loss by time step", WEIGHTINGS, group=LEARNT)
    noise_offset: float = option(
        "offset noise, the same all over a channel (Guttenberg 2023)", 0.0, least=0, most=1,
        group=LEARNT, metavar="X",
    )  # fmt: skip
    vae_widths: tuple = (32, 64)  # channels per level: f = 2^(levels − 1)
    vae_layers: int = 1  # ResNet blocks per level of the encoder; the decoder has one more
    latent_channels: int = 4
    unet_widths: tuple = (48, 48, 96)
    unet_attention: tuple = (False, True, True)  # per level
    unet_layers: int | tuple = 1  # ResNet blocks per level on the way down, or of each level
    heads: int = 4
    groups: int = 8
    text_width: int = 64
    text_layers: int = 1
    tokens: int = 16
    vocabulary: int = 1024
    schedule: str = choice("noise schedule", SCHEDULES, group=LEARNT)
    prediction: str = option(
        f"prediction of the U-Net: {', '.join(PREDICTIONS)}", "v_prediction",
        choices=PREDICTIONS, group=LEARNT,
    )  # fmt: skip
    steps: int = 25  # of sampling
    guidance: float = 2.0

    def __post_init__(self):
        if isinstance(self.data, os.PathLike):
            object.__setattr__(self, "data", os.fspath(self.data))
        check_options(self, ConfigError)
        _check_fields("config", self)
        if self.data == "":  # as of a variable that is not set: Path("") is the folder we are in
            raise ConfigError("data: expected the name of a folder, found ''")
        if not (self.vae_widths and self.unet_widths):
            raise ConfigError("vae_widths and unet_widths: expected a level or more, found none")
        if len(self.sides) != 2:
            raise ConfigError(f"side: expected an integer, or two, found {self.side}")
        Schedule(self.scheduler_config())  # raises where the prediction does not go with it
        least = min(self.sides)
        if self.adversarial and (self.first_stage == "none" or least < DISCRIMINATED):
            raise ConfigError(
                f"adversarial: expected an autoencoder (kl or vq) of {DISCRIMINATED} pixels or "
                f"more, found first_stage {self.first_stage} of {least} pixels"
            )
        factor = self.factor * 2 ** (len(self.unet_widths) - 1)
        factor = math.lcm(factor, times_larger(self.task))
        for side in self.sides:
            if side < factor or side % factor:
                below = max(1, side // factor) * factor
                raise ConfigError(
                    f"size: expected a multiple of {factor} (the levels of the networks halve it), "
                    f"found {side}; the nearest are {below} and {below + factor}"
                )
        if self.data == "shapes" and len(set(self.sides)) > 1:
            raise ConfigError("size: shapes are drawn in squares; other sizes need --data FOLDER")

    @classmethod
    def from_json(cls, content: dict) -> "Config":
        """Rebuild a Config from the JSON of dataclasses.asdict. ConfigError for others."""
        content = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        if "pictures" in content:  # its name in states written before the rename
            content["images"] = content.pop("pictures")
        _known("config", cls, content)
        for stage in STAGES:
            content[stage] = Stage(**_known(stage, Stage, content[stage]))
        return cls(**content)

    @property
    def sides(self) -> tuple[int, int]:
        """Return (height, width) of an image."""
        return both_sides(self.side)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (h, w, c) of an image's latents."""
        height, width = self.sides
        return height // self.factor, width // self.factor, self.channels

    @property
    def image_channels(self) -> int:
        """Return the number of channels of the images, as the networks take them."""
        return 1 if self.grey else 3

    @property
    def factor(self) -> int:
        """Return the downsampling factor: pixels of a side for each latent."""
        return 1 if self.first_stage == "none" else 2 ** (len(self.vae_widths) - 1)

    @property
    def channels(self) -> int:
        """Return the number of latent channels."""
        return self.image_channels if self.first_stage == "none" else self.latent_channels

    @property
    def has_classes(self) -> bool:
        """Return whether classes, not texts, are the condition."""
        return self.condition.startswith("class")

    def configs(self, tokenizer: Tokenizer | ClassNames) -> dict[str, dict]:
        """Return the config of each component; no text encoder where the U-Net embeds classes."""
        configs = {
            "unet": self.unet_config(len(tokenizer)),
            "vae": self.vae_config(),
            "scheduler": self.scheduler_config(),
        }
        if self.condition == "class-token":
            kind = {"_class_name": "ClassEmbedder"}
            sizes = {"num_classes": len(tokenizer), "hidden_size": self.text_width}
            configs["text_encoder"] = kind | sizes
        elif self.condition != "class-time":
            configs["text_encoder"] = self.text_config(tokenizer)
        return configs

    def vae_config(self) -> dict:
        """Return the config of diffusers' AutoencoderKL or VQModel, or our IdentityFirstStage."""
        kind = {"_class_name": FIRST_STAGES[self.first_stage]}
        if self.first_stage == "none":
            sizes = {"in_channels": self.image_channels, "sample_size": max(self.sides)}
            return kind | sizes | {"scaling_factor": 1.0}
        if self.first_stage == "vq":
            kind["num_vq_embeddings"] = self.codes
        levels = len(self.vae_widths)
        return kind | {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(self.vae_widths),
            "layers_per_block": self.vae_layers,
            "in_channels": self.image_channels,
            "out_channels": self.image_channels,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.groups,
            "sample_size": max(self.sides),
            "mid_block_add_attention": False,
            "scaling_factor": 1.0,  # until it is measured
        }

    def unet_config(self, classes: int | None = None) -> dict:
        """Return the config of diffusers' UNet2DConditionModel.

        Where a class comes with the time, there is no context: positions attend to one another.
        """
        condition = {"cross_attention_dim": self.text_width}
        if self.condition == "class-time":
            dims = list(self.unet_widths)
            condition = {"cross_attention_dim": dims, "num_class_embeds": classes}
        elif not self.has_classes:
            text = {"addition_embed_type": "text", "addition_embed_type_num_heads": self.heads}
            condition |= text
        h, w, _ = self.latent_shape
        return condition | {
            "sample_size": h if h == w else [h, w],
            "in_channels": self.channels + concat_channels(self.task, self.channels),
            "out_channels": self.channels,
            "down_block_types": [
                "CrossAttnDownBlock2D" if attends else "DownBlock2D"
                for attends in self.unet_attention
            ],
            "up_block_types": [
                "CrossAttnUpBlock2D" if attends else "UpBlock2D"
                for attends in reversed(self.unet_attention)
            ],
            "block_out_channels": list(self.unet_widths),
            "layers_per_block": self.unet_layers,
            "attention_head_dim": self.heads,
            "norm_num_groups": self.groups,
        }

    def text_config(self, tokenizer: Tokenizer) -> dict:
        """Return the config of transformers' CLIPTextModel."""
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": len(tokenizer),
            "hidden_size": self.text_width,
            "intermediate_size": 2 * self.text_width,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.tokens,
            "hidden_act": "quick_gelu",
            "bos_token_id": tokenizer.start_id,
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
        }

    def scheduler_config(self) -> dict:
        """Return the config of diffusers' DDIMScheduler."""
        return {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": DIFFUSERS_VERSION,
            "num_train_timesteps": 1000,
            "prediction_type": self.prediction,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        } | SCHEDULES[self.schedule]


def discriminator_of(config: Config) -> PatchDiscriminator:
    """Build the discriminator of a config's images, without parameters."""
    sizes = config.image_channels, config.vae_widths[0], config.groups
    return PatchDiscriminator("discriminator", *sizes)


DEMO_AUTOENCODER = Stage(batch=16, rate=2e-3, warmup=50, ema=0.995, seconds=72)
DEMO_DENOISER = Stage(batch=32, rate=2e-3, warmup=50, ema=0.995, seconds=188)
