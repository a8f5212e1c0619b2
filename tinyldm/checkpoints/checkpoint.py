"""Load a whole model, from a folder in diffusers' layout or from one file in the original one."""

from pathlib import Path

from tinyldm.backend import to_device
from tinyldm.checkpoints.diffusers_folder import load_folder, load_with_config
from tinyldm.checkpoints.single_file import load_original, load_original_vae
from tinyldm.data.class_names import ClassNames
from tinyldm.data.tokenizer import Tokenizer
from tinyldm.files import shown
from tinyldm.nn.protocol import Params
from tinyldm.options import path_of


def load_checkpoint(
    path: str | Path, device: str = "cpu", vae: str | Path | None = None
) -> tuple[dict[str, dict], dict[str, Params], Tokenizer | ClassNames, dict]:
    """Read a folder, or a .safetensors file that holds a whole Stable Diffusion.

    → configs {"unet", "vae", "text_encoder", "scheduler": …}, float32 params of the first three,
    the tokenizer, and the sampling defaults of the folder. There is no text_encoder where the U-Net
    embeds classes itself. vae: an autoencoder to use instead, a folder or a file.
    Raises FileNotFoundError, ConfigError or WeightsError, each with a message of one line.
    """
    path, own = path_of("folder", path), vae is None
    vae = None if own else path_of("vae", vae)
    for each in (path, *([] if own else [vae])):
        if not each.exists():
            raise FileNotFoundError(
                f"{shown(each)}: no such file or folder; expected the folder of a trained run, or "
                "a Stable Diffusion as a folder or one .safetensors file"
            )
    configs, params, tokenizer, defaults = (
        (*load_original(path, own), {}) if path.is_file() else load_folder(path, own)
    )
    if not own:
        configs["vae"], params["vae"] = _load_vae(vae)
    return configs, to_device(params, device), tokenizer, defaults


def _load_vae(path):
    """Load an autoencoder → config, weights; of a whole model's folder, the one in it."""
    if path.is_file() and not (path.parent / "config.json").exists():
        return load_original_vae(path)
    if path.is_file():  # beside a config: these weights, whatever others are there
        return load_with_config(path.parent, "vae", [path])
    return load_with_config(path / "vae" if (path / "vae").is_dir() else path, "vae")
