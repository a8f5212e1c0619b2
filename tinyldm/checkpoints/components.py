"""The components of a model: their folders, classes and files, here and in diffusers."""

from tinyldm.config import ConfigError
from tinyldm.data.class_names import ClassNames
from tinyldm.data.tokenizer import Tokenizer
from tinyldm.files import shown
from tinyldm.models import (
    AutoencoderKL,
    ClassEmbedder,
    IdentityFirstStage,
    TextEncoder,
    UNet,
    VQModel,
)
from tinyldm.nn.layers import Layer

COMPONENTS = {  # folder → (library and class that diffusers loads, our class, file of weights)
    "unet": (("diffusers", "UNet2DConditionModel"), UNet, "diffusion_pytorch_model.safetensors"),
    "vae": (("diffusers", "AutoencoderKL"), AutoencoderKL, "diffusion_pytorch_model.safetensors"),
    "text_encoder": (("transformers", "CLIPTextModel"), TextEncoder, "model.safetensors"),
}
OTHERS = {  # folder → {`_class_name` of its config: (library that has the class, our class)}
    "vae": {
        "VQModel": ("diffusers", VQModel),
        "IdentityFirstStage": ("tinyldm.models", IdentityFirstStage),
    },
    "text_encoder": {"ClassEmbedder": ("tinyldm.models", ClassEmbedder)},
}
CLASS_NAMES = ["tinyldm.models", "ClassNames"]  # in model_index.json, in place of a tokenizer
NONE = [None, None]  # in model_index.json, for a component that the model lacks
OWN_PIPELINE = "TinyLDMPipeline"  # in the folder of a model that no pipeline of diffusers fits
PIPELINES = (  # of diffusers, whose folders hold these components and no other that matters
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
)
DIFFUSERS_VERSION = "0.32.0"  # whose file formats these are


def make(component: str, config: dict) -> Layer:
    """Build the network of a component, of the class that its config names."""
    (library, usual), network, _ = COMPONENTS[component]
    classes = {usual: (library, network), **OTHERS.get(component, {})}
    kind = config.get("_class_name", usual)
    if not isinstance(kind, str) or kind not in classes:
        raise ConfigError(
            f"{component} config: a {shown(kind):.40} is not implemented, only {', '.join(classes)}"
        )
    return classes[kind][1](config)


def pipeline_class(configs: dict[str, dict], tokenizer: Tokenizer | ClassNames) -> str:
    """Name the pipeline class of diffusers that fits, or our own where none does."""
    unet, vae = (make(name, configs[name]) for name in ("unet", "vae"))
    extra = unet.config.in_channels - vae.latent_channels
    fitting = {0: PIPELINES[0], vae.latent_channels + 1: PIPELINES[2]}
    usual = isinstance(vae, AutoencoderKL) and isinstance(tokenizer, Tokenizer)
    return fitting.get(extra, OWN_PIPELINE) if usual else OWN_PIPELINE
