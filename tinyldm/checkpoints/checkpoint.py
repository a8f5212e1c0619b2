"""Load a whole model, from a folder of diffusers' layout or from one file of the original one."""

from pathlib import Path

from tinyldm.backend import to_device
from tinyldm.checkpoints.diffusers_folder import load_folder, load_with_config
from tinyldm.checkpoints.single_file import load_original, load_original_vae
from tinyldm.data.class_names import ClassNames
from tinyldm.data.tokenizer import Tokenizer
from tinyldm.nn.protocol import Params


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
        (*load_original(path, own), {}) if path.is_file() else load_folder(path, own)
    )
    if not own:
        configs["vae"], params["vae"] = _load_vae(Path(vae))
    return configs, to_device(params, device), tokenizer, defaults


def _load_vae(path):
    """→ config, weights. Of the folder of a whole model, the autoencoder in it."""
    if path.is_file() and not (path.parent / "config.json").exists():
        return load_original_vae(path)
    path = path.parent if path.is_file() else path
    return load_with_config(path / "vae" if (path / "vae").is_dir() else path, "vae")
