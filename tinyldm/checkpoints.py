"""A model on disk: the folder of diffusers' layout, or one file of the original one.

The folder holds `model_index.json` and a sub-folder for each component, whether tinyldm trained the
model or somebody else did, and diffusers loads what tinyldm saves.
"""

from pathlib import Path

from tinyldm.backend import to_device
from tinyldm.config import ConfigError
from tinyldm.files import read_json, write_json
from tinyldm.models import (
    AutoencoderKL,
    ClassEmbedder,
    ClassNames,
    IdentityFirstStage,
    TextEncoder,
    Tokenizer,
    UNet,
    VQModel,
)
from tinyldm.models.original import load_original, load_original_vae
from tinyldm.models.weights import load_component, save_weights
from tinyldm.nn.layers import Layer
from tinyldm.nn.protocol import Params

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
NONE = [None, None]  # in model_index.json, of a component that the model does without
OWN_PIPELINE = "TinyLDMPipeline"  # in the folder of a model that no pipeline of diffusers fits
PIPELINES = (  # of diffusers, whose folders hold these components and no other that matters
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
)
DIFFUSERS_VERSION = "0.32.0"  # whose file formats these are


def load_checkpoint(
    path: str | Path, device: str = "cpu", vae: str | Path | None = None
) -> tuple[dict[str, dict], dict[str, Params], Tokenizer | ClassNames, dict]:
    """Read a folder, or a .safetensors file that holds a whole Stable Diffusion.

    → configs {"unet", "vae", "text_encoder", "scheduler": …}, float32 params of the first three,
    the tokenizer, and what else the folder says of sampling. A model whose U-Net knows classes by
    itself has no text_encoder. vae: an autoencoder to take instead, a folder or a file.
    FileNotFoundError, ConfigError or WeightsError say in one line what is wrong.
    """
    path = Path(path)
    for each in (path, *([Path(vae)] if vae is not None else [])):
        if not each.exists():
            raise FileNotFoundError(
                f"{each}: no such file or folder; expected the folder of a trained run, or a "
                "Stable Diffusion as a folder or one .safetensors file"
            )
    own = vae is None
    configs, params, tokenizer, defaults = (
        (*load_original(path, own), {}) if path.is_file() else _load_folder(path, own)
    )
    if not own:
        configs["vae"], params["vae"] = _load_vae(Path(vae))
    return configs, to_device(params, device), tokenizer, defaults


def _load_folder(folder, with_vae):
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name", PIPELINES[0])
    if kind not in (*PIPELINES, OWN_PIPELINE):
        raise ConfigError(
            f"{folder / 'model_index.json'}: a {kind} is not implemented, only Stable Diffusion 1 "
            f"and 2: {', '.join(PIPELINES)}"
        )
    configs = {"scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}
    params = {}
    for name in COMPONENTS:
        if index.get(name) != NONE and (name != "vae" or with_vae):
            configs[name], params[name] = _load_component(folder / name, name)
    kind = ClassNames if index.get("tokenizer") == CLASS_NAMES else Tokenizer
    tokenizer = kind.load(folder / "tokenizer")
    return configs, params, tokenizer, index.get("_tinyldm") or {}


def _load_vae(path):
    """→ config, weights. Of the folder of a whole model, the autoencoder in it."""
    if path.is_file() and not (path.parent / "config.json").exists():
        return load_original_vae(path)
    path = path.parent if path.is_file() else path
    return _load_component(path / "vae" if (path / "vae").is_dir() else path, "vae")


def _load_component(folder, name):
    config = read_json(folder / "config.json")
    return config, load_component(folder, make(name, config).shapes())


def make(component: str, config: dict) -> Layer:
    """The network of a component, of the class that its config names."""
    (library, usual), network, _ = COMPONENTS[component]
    classes = {usual: (library, network), **OTHERS.get(component, {})}
    kind = config.get("_class_name", usual)
    if kind not in classes:
        raise ConfigError(
            f"{component} config: a {kind} is not implemented, only {', '.join(classes)}"
        )
    return classes[kind][1](config)


def _pipeline_class(configs, tokenizer):
    """That of diffusers, where one fits."""
    unet, vae = (make(name, configs[name]) for name in ("unet", "vae"))
    beside = unet.config.in_channels - vae.latent_channels
    fitting = {0: PIPELINES[0], vae.latent_channels + 1: PIPELINES[2]}
    usual = isinstance(vae, AutoencoderKL) and isinstance(tokenizer, Tokenizer)
    return fitting.get(beside, OWN_PIPELINE) if usual else OWN_PIPELINE


def save_folder(
    folder: str | Path,
    configs: dict[str, dict],
    params: dict[str, Params],
    tokenizer: Tokenizer | ClassNames,
    defaults: dict,
    scheduler: str,
) -> None:
    """Write the folder; `model_index.json` comes last, so a folder that has it is whole.

    scheduler: diffusers' class.
    """
    folder = Path(folder)
    (folder / "model_index.json").unlink(missing_ok=True)
    index = {
        "_class_name": _pipeline_class(configs, tokenizer),
        "_diffusers_version": DIFFUSERS_VERSION,
        "_tinyldm": defaults,
        "feature_extractor": NONE,
        "requires_safety_checker": False,
        "safety_checker": NONE,
        "scheduler": ["diffusers", scheduler],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if isinstance(tokenizer, ClassNames):
        index["tokenizer"] = CLASS_NAMES
    for name, ((library, usual), _, file) in COMPONENTS.items():
        if name not in configs:
            index[name] = NONE
            continue
        kind = configs[name].get("_class_name", usual)
        library, _ = OTHERS.get(name, {}).get(kind, (library, None))
        index[name] = [library, kind]
        note = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION}
        write_json(folder / name / "config.json", note | configs[name])
        weights = to_device(params[name], "cpu")
        save_weights(folder / name / file, weights, {"format": "pt"})
    write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
    tokenizer.save(folder / "tokenizer")
    write_json(folder / "model_index.json", index)
