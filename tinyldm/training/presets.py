"""What a run is made of, and the presets: sizes, rates, and how long each stage takes."""

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stage of training. Its length is `steps`, or what fits into `seconds` on this machine."""

    batch: int
    rate: float  # peak of the learning rate
    warmup: int  # steps
    ema: float  # limit of the decay of the moving average
    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. It is stored in the run's state."""

    data: str = "shapes"  # or a folder
    side: int = 32  # pixels
    pictures: int = 20_000  # to draw, for shapes
    seed: int = 0
    autoencoder: Stage = field(default_factory=lambda: DEMO_AUTOENCODER)
    denoiser: Stage = field(default_factory=lambda: DEMO_DENOISER)
    kl_weight: float = 1e-4  # of the mean KL a latent number, beside the mean squared error
    caption_dropout: float = 0.1  # share of captions left out, so that guidance has a "without"
    min_snr: float | None = None
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

    @classmethod
    def from_json(cls, content):
        """The inverse of dataclasses.asdict, after a trip through JSON."""
        content = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        for stage in ("autoencoder", "denoiser"):
            content[stage] = Stage(**content[stage])
        return cls(**content)

    def vae_config(self):
        levels = len(self.vae_widths)
        return {
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

    def unet_config(self):
        return {
            "sample_size": self.side // 2 ** (len(self.vae_widths) - 1),
            "in_channels": self.latent_channels,
            "out_channels": self.latent_channels,
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

    def text_config(self, tokenizer):
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

    def scheduler_config(self):
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
    "demo": Config(),
    "tiny": Config(
        side=16,
        pictures=512,
        autoencoder=dataclasses.replace(DEMO_AUTOENCODER, steps=60, seconds=None, warmup=10),
        denoiser=dataclasses.replace(DEMO_DENOISER, steps=60, seconds=None, warmup=10, batch=16),
        vae_widths=(8, 16),
        unet_widths=(16, 32),
        unet_attention=(False, True),
        text_width=32,
        steps=5,
    ),
}
