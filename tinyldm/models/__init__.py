"""The networks of Stable Diffusion, and the tokenizer that feeds its text encoder."""

import tinyldm.kernels  # noqa: F401  (registers what makes the networks fast)
from tinyldm.data.class_names import ClassNames
from tinyldm.data.tokenizer import Tokenizer
from tinyldm.models.autoencoder import AutoencoderKL
from tinyldm.models.class_embedder import ClassEmbedder
from tinyldm.models.identity import IdentityFirstStage
from tinyldm.models.text_encoder import TextEncoder
from tinyldm.models.unet import UNet
from tinyldm.models.vq import VQModel

__all__ = [
    "AutoencoderKL",
    "ClassEmbedder",
    "ClassNames",
    "IdentityFirstStage",
    "TextEncoder",
    "Tokenizer",
    "UNet",
    "VQModel",
]
