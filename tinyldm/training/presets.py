"""What a run is made of, and the presets: sizes, rates, and how long each stage takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tinyldm.config import ConfigError, unknown
from tinyldm.diffusion.objective import WEIGHTINGS
from tinyldm.models import Tokenizer

STAGES = ("autoencoder", "denoiser")
DISCRIMINATED = 16  # pixels of a side, at least, for the discriminator's convolutions
FIRST_STAGES = {"kl": "AutoencoderKL", "vq": "VQModel", "none": "IdentityFirstStage"}


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


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. It is stored in the run's state."""

    preset: str = "demo"
    data: str = "shapes"  # or a folder
    side: int = 32  # pixels
    pictures: int = 20_512  # to draw, for shapes
    flip: bool = False  # train on every picture's mirror image, too
    held_out: float = 0.05  # share of the pictures that validate and are never trained on
    skip_bad: bool = False  # leave out files that cannot be read, instead of refusing the folder
    keep: int = 2  # states on disk: the newest, and those before it
    seed: int = 0
    autoencoder: Stage = field(default_factory=lambda: DEMO_AUTOENCODER)
    denoiser: Stage = field(default_factory=lambda: DEMO_DENOISER)
    first_stage: str = "kl"  # or "vq" with a codebook, or "none" for diffusion in pixels
    codes: int = 256  # of the codebook
    kl_weight: float = 1e-4  # of the mean KL a latent number, beside the mean squared error
    perceptual: float = 0.0  # weight of the perceptual loss, on a network given in Python
    adversarial: float = 0.0  # weight of the discriminator of stage 1, beside the adaptive one
    adversarial_start: float = 0.5  # share of the stage's steps after which it begins
    caption_dropout: float = 0.1  # share of captions left out, so that guidance has a "without"
    weighting: str = "simple"  # of the loss by t, or "min-snr" or "variational"
    noise_offset: float = 0.0  # of a noise that is the same all over a channel (Guttenberg 2023)
    vae_widths: tuple = (32, 64)  # channels per level: f = 2^(levels − 1)
    latent_channels: int = 4
    unet_widths: tuple = (48, 48, 96)
    unet_attention: tuple = (False, True, True)  # per level
    unet_layers: int = 1
    heads: int = 4
    groups: int = 8
    text_width: int = 64
    text_layers: int = 1
    tokens: int = 16
    vocabulary: int = 1024
    prediction: str = "v_prediction"
    steps: int = 25  # of sampling
    guidance: float = 2.0

    def __post_init__(self):
        if self.first_stage not in FIRST_STAGES:
            raise ConfigError(f"first_stage: {unknown(self.first_stage, FIRST_STAGES)}")
        if self.weighting not in WEIGHTINGS:
            raise ConfigError(f"weighting: {unknown(self.weighting, WEIGHTINGS)}")
        if self.adversarial and (self.first_stage == "none" or self.side < DISCRIMINATED):
            raise ConfigError(
                f"adversarial: expected an autoencoder (kl or vq) of {DISCRIMINATED} pixels or "
                f"more, found first_stage {self.first_stage} of {self.side} pixels"
            )
        factor = self.factor * 2 ** (len(self.unet_widths) - 1)
        if self.side < factor or self.side % factor:
            below = max(1, self.side // factor) * factor
            raise ConfigError(
                f"size: expected a multiple of {factor} (the levels of the networks halve it), "
                f"found {self.side}; the nearest are {below} and {below + factor}"
            )

    @classmethod
    def from_json(cls, content: dict) -> "Config":
        """The inverse of dataclasses.asdict, after a trip through JSON."""
        content = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        for stage in ("autoencoder", "denoiser"):
            content[stage] = Stage(**content[stage])
        return cls(**content)

    @property
    def factor(self) -> int:
        """Pixels of a side for each latent."""
        return 1 if self.first_stage == "none" else 2 ** (len(self.vae_widths) - 1)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return 3 if self.first_stage == "none" else self.latent_channels

    def vae_config(self) -> dict:
        """diffusers' AutoencoderKL or VQModel, or our IdentityFirstStage."""
        kind = {"_class_name": FIRST_STAGES[self.first_stage]}
        if self.first_stage == "none":
            return kind | {"in_channels": 3, "sample_size": self.side, "scaling_factor": 1.0}
        if self.first_stage == "vq":
            kind["num_vq_embeddings"] = self.codes
        levels = len(self.vae_widths)
        return kind | {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(self.vae_widths),
            "layers_per_block": 1,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.groups,
            "sample_size": self.side,
            "mid_block_add_attention": False,
            "scaling_factor": 1.0,  # until it is measured
        }

    def unet_config(self) -> dict:
        """diffusers' UNet2DConditionModel."""
        return {
            "sample_size": self.side // self.factor,
            "in_channels": self.channels,
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
            "cross_attention_dim": self.text_width,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": self.heads,
        }

    def text_config(self, tokenizer: Tokenizer) -> dict:
        """transformers' CLIPTextModel."""
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
        """diffusers' DDIMScheduler."""
        return {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.32.0",
            "num_train_timesteps": 1000,
            # Noisier than Stable Diffusion's schedule, whose last steps still show where a large
            # shape on plain ground is: the network would never need to read that in the caption.
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "prediction_type": self.prediction,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        }


DEMO_AUTOENCODER = Stage(batch=16, rate=2e-3, warmup=50, ema=0.995, seconds=72)
DEMO_DENOISER = Stage(batch=32, rate=2e-3, warmup=50, ema=0.995, seconds=188)

PRESETS = {
    "tiny": Config(
        preset="tiny",
        side=16,
        pictures=512,
        autoencoder=replace(DEMO_AUTOENCODER, steps=60, seconds=None, warmup=10),
        denoiser=replace(DEMO_DENOISER, steps=60, seconds=None, warmup=10, batch=16),
        vae_widths=(8, 16),
        unet_widths=(16, 32),
        unet_attention=(False, True),
        text_width=32,
        steps=5,
    ),
    "demo": Config(),
    "medium": Config(
        preset="medium",
        side=64,
        autoencoder=Stage(batch=16, rate=1e-3, warmup=100, ema=0.998, seconds=600),
        denoiser=Stage(batch=32, rate=1e-3, warmup=100, ema=0.999, seconds=1200),
        vae_widths=(32, 64, 64),
        unet_widths=(64, 96, 128),
        text_width=96,
    ),
    "large": Config(
        preset="large",
        side=128,
        autoencoder=Stage(batch=8, rate=5e-4, warmup=200, ema=0.999, seconds=3600),
        denoiser=Stage(batch=32, rate=5e-4, warmup=200, ema=0.9995, seconds=7200),
        vae_widths=(32, 64, 64, 96),
        latent_channels=8,
        unet_widths=(64, 128, 192),
        text_width=128,
    ),
}
FOR_TESTS = "tiny"  # too small to be chosen by size


def make_config(
    preset: str | None = None,
    size: int | None = None,
    minutes: float | None = None,
    accumulate: int | None = None,
    **others: object,
) -> Config:
    """The config of a new run.

    preset: by default the smallest for pictures of `size`. size: pixels of a side, by default the
    preset's. minutes: of training, shared between the stages as the preset does. accumulate: parts
    of each batch, one after the other. others: any field of Config.
    ConfigError for an unknown preset, or a size that does not divide.
    """
    if preset is None:
        by_side = sorted((c.side, name) for name, c in PRESETS.items() if name != FOR_TESTS)
        fitting = [name for side, name in by_side if side >= (size or PRESETS["demo"].side)]
        preset = fitting[0] if fitting else by_side[-1][1]
    if preset not in PRESETS:
        raise ConfigError(f"preset: {unknown(preset, PRESETS)}")
    config = replace(PRESETS[preset], **others)
    if size is not None:
        config = replace(config, side=size)
    if accumulate is not None:
        stages = {name: replace(getattr(config, name), parts=accumulate) for name in STAGES}
        config = replace(config, **stages)
    return config if minutes is None else with_length(config, 60 * minutes)


def with_length(config: Config, seconds: float, stages: Sequence[str] = STAGES) -> Config:
    """The config whose `stages` take `seconds` together, in the proportion that they have in it."""
    parts = {name: getattr(config, name) for name in stages}
    lengths = {name: part.seconds or part.steps for name, part in parts.items()}
    whole = sum(lengths.values())
    parts = {
        name: replace(part, steps=None, seconds=seconds * lengths[name] / whole)
        for name, part in parts.items()
    }
    return replace(config, **parts)


def changed(config: Config, **settings: object) -> Config:
    """The config of a run that is resumed with other settings; those that are None stay the same.

    keep, data (if the pictures have moved) and skip_bad may change. ConfigError for preset, size,
    seed, first_stage, adversarial or flip that differ: the result would not be the run that was
    begun.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    began = {"preset": config.preset, "size": config.side, "seed": config.seed}
    began |= {"first_stage": config.first_stage, "flip": config.flip}
    began |= {"adversarial": config.adversarial}
    for name in began.keys() & given.keys():
        if given.pop(name) != began[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} {settings[name]}: the run began with {began[name]}, "
                "which stays; what may change on --resume: --minutes, --keep, --device, and --data "
                "if the same pictures have moved"
            )
    return replace(config, **given)
