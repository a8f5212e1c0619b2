"""The networks of Stable Diffusion, and the files they live in."""

from tinyldm.models.autoencoder import AutoencoderKL
from tinyldm.models.classes import ClassEmbedder, ClassNames
from tinyldm.models.identity import IdentityFirstStage
from tinyldm.models.text_encoder import TextEncoder
from tinyldm.models.tokenizer import Tokenizer
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
