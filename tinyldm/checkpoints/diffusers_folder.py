"""Load and save a model as a folder in diffusers' layout, which diffusers loads unchanged.

The folder holds `model_index.json` and a sub-folder for each component, whether tinyldm trained the
model or somebody else did.
"""

import contextlib
import json
import re
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

from numpy.typing import DTypeLike

from tinyldm.backend import to_device
from tinyldm.checkpoints.components import (
    CLASS_NAMES,
    COMPONENTS,
    DIFFUSERS_VERSION,
    NONE,
    OTHERS,
    OWN_PIPELINE,
    PIPELINES,
    make,
    pipeline_class,
)
from tinyldm.checkpoints.safetensors import (
    PICKLED,
    PICKLES,
    WeightsError,
    checksum_noted,
    match,
    reshaped,
    save_weights,
    tensors,
)
from tinyldm.config import ConfigError, brief
from tinyldm.data.class_names import ClassNames
from tinyldm.data.tokenizer import Tokenizer
from tinyldm.diffusion.schedule import Schedule
from tinyldm.diffusion.scheduler_config import repaired
from tinyldm.files import is_regular, read_json, shown, some, write_json
from tinyldm.lock import is_locked
from tinyldm.nn.protocol import Params

CHECKSUMS = "checksums.json"  # {file: checksum} of all that is written here
FORMAT = "tinyldm 2"  # which it says, as others may have a file of this name
UNFINISHED: dict[str, str] = {"": ""}  # in place of its files, until all is written

# How the names of published files have changed: an old one → that of today.
OLD_NAMES = [
    (re.compile(r"(attentions\.\d+)\.query\."), r"\1.to_q."),
    (re.compile(r"(attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
    (re.compile(r"^"), "text_model."),
]


def load_folder(
    folder: Path, with_vae: bool = True
) -> tuple[dict[str, dict], dict[str, Params], Tokenizer | ClassNames, dict]:
    """Read configs, float32 params, tokenizer and sampling defaults; see `load_checkpoint`.

    Without `with_vae` the autoencoder is left out. In a folder that was written here all files are
    of one export: while a training run writes another, this waits for it. Raises Unfinished where
    that was cut off, WeightsError where weights are not those that were written. A text file that
    somebody has edited is read, with a warning.
    """
    told = False
    while True:
        recorded = _recorded(folder)
        if recorded is UNFINISHED:
            if not is_locked(folder):
                raise Unfinished(
                    f"{folder}: the files are not of one model, as writing them was cut off; write "
                    "them again, or train again"
                )
            if not told:
                warnings.warn(
                    f"{folder}: a training run has yet to write the model; waiting for it",
                    stacklevel=3,
                )
            told = True
            time.sleep(0.05)
            continue
        try:
            loaded = _load_folder(folder, with_vae)
        except (ValueError, OSError):
            if _recorded(folder) == recorded:
                raise
            continue  # a training run has begun to write another
        if _recorded(folder) == recorded:
            break
    for name, checksum in recorded.items():
        if not (folder / name).exists() or _checksum(folder / name) == checksum:
            continue  # what is missing was not needed, as with another autoencoder
        if name.endswith(".safetensors"):
            raise WeightsError(
                f"{folder / name}: not the weights that were written with the other files; to "
                f"take them all the same, remove {folder / CHECKSUMS}"
            )
        warnings.warn(f"{folder / name}: edited since the model was written", stacklevel=3)
    return loaded


class Unfinished(WeightsError):
    """An export was cut off: its files are not of one model."""


def is_whole(folder: Path) -> bool:
    """Return whether there is a model in the folder, written to its end."""
    return (folder / "model_index.json").exists() and _recorded(folder) is not UNFINISHED


def _recorded(folder):
    """Return {file: checksum} of the files as they were written here, or UNFINISHED.

    {} in the folders of others, whatever they call a file.
    """
    file = folder / CHECKSUMS
    if not file.exists():
        return {}
    content = read_json(file)
    files, ours = content.get("files"), content.get("format") == FORMAT
    if not ours and "crc" not in content:
        return {}
    if files is None and content == {"format": FORMAT}:
        return UNFINISHED
    outside = not isinstance(files, dict) or any(
        ".." in Path(name).parts or name[:1] == "/" for name in files
    )
    if outside or content.get("crc") != _crc_of(files) or not ours:
        raise WeightsError(f"{file}: damaged; to take the files as they are, remove it")
    return files


def _crc_of(files):
    return f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"


def _checksum(file):
    """Return the checksum of a file: that among its notes, or of all its bytes; None without it."""
    if not file.exists() or not is_regular(file):
        return None
    if file.suffix == ".safetensors":
        return checksum_noted(file)
    return f"{zlib.crc32(file.read_bytes()):08x}"


def _load_folder(folder, with_vae):
    index_file = folder / "model_index.json"
    index = read_json(index_file)
    kind = index.get("_class_name", PIPELINES[0])
    defaults = index.get("_tinyldm", {})
    if not isinstance(defaults, (dict, NoneType)):
        raise ConfigError(
            f"{shown(index_file)}: _tinyldm: expected an object, found {brief(defaults)}"
        )
    if kind not in (*PIPELINES, OWN_PIPELINE):
        raise ConfigError(
            f"{shown(index_file)}: a {shown(kind):.60} is not implemented, only Stable "
            f"Diffusion 1 and 2: {', '.join(PIPELINES)}"
        )
    file = folder / "scheduler" / "scheduler_config.json"
    configs, params = {"scheduler": read_json(file)}, {}
    match index.get("scheduler"):
        case [_, str(scheduler)]:  # which diffusers makes, whatever the config calls itself
            named = configs["scheduler"].get("_class_name", scheduler)
            if named != scheduler:
                warnings.warn(
                    f"{shown(file)}: names a {shown(named):.60}, and model_index.json a "
                    f"{shown(scheduler):.60}, which is taken, as by diffusers",
                    stacklevel=4,
                )
            configs["scheduler"] |= {"_class_name": scheduler}
    with naming(file):
        Schedule(configs["scheduler"])
    for name in COMPONENTS:
        if name == "vae" and not with_vae:
            continue
        if index.get(name) != NONE:
            configs[name], params[name] = load_with_config(folder / name, name)
        elif name != "text_encoder":
            raise ConfigError(
                f"{shown(index_file)}: {name}: expected its library and class, found {NONE}"
            )
    if configs.get("text_encoder", {}).get("use_attention_mask"):  # a key of the pipeline's
        raise ConfigError(
            f"{shown(folder / 'text_encoder' / 'config.json')}: use_attention_mask is not "
            "implemented: every token is attended to"
        )
    if kind in PIPELINES:
        scheduler, unet = configs["scheduler"], configs["unet"]
        configs["scheduler"], configs["unet"] = repaired(scheduler, unet, "Inpaint" in kind)
    kind = ClassNames if index.get("tokenizer") == CLASS_NAMES else Tokenizer
    tokenizer = kind.load(folder / "tokenizer")
    return configs, params, tokenizer, defaults or {}


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Begin what is wrong with a config with the name of its file."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{shown(file)}: {error}") from None


def load_with_config(
    folder: Path, name: str, files: list[Path] | None = None
) -> tuple[dict, Params]:
    """Read the config and the weights of the component `name` from its own folder.

    files: of the weights, by default those that diffusers would take.
    """
    config = read_json(folder / "config.json")
    with naming(folder / "config.json"):
        shapes = make(name, config).shapes()
    return config, load_component(folder, shapes, files=files)


def save_folder(
    folder: Path,
    configs: dict[str, dict],
    params: dict[str, Params],
    tokenizer: Tokenizer | ClassNames,
    defaults: dict,
    scheduler: str,
) -> None:
    """Write the folder. Its checksums come last: until then it counts as unfinished.

    scheduler: diffusers' class.
    """
    write_json(folder / CHECKSUMS, {"format": FORMAT})
    index = {
        "_class_name": pipeline_class(configs, tokenizer),
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
    written = [
        folder / "model_index.json",
        folder / "scheduler" / "scheduler_config.json",
        *(folder / "tokenizer" / name for name in tokenizer.FILES),
    ]
    for name in params:
        written += [folder / name / "config.json", folder / name / COMPONENTS[name][2]]
    recorded = {file.relative_to(folder).as_posix(): _checksum(file) for file in written}
    content = {"format": FORMAT, "files": recorded, "crc": _crc_of(recorded)}
    write_json(folder / CHECKSUMS, content)


def load_component(
    folder: str | Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: DTypeLike = "float32",
    files: list[Path] | None = None,
) -> Params:
    """Load one component's weights from a diffusers folder, checked against the model's `shapes`.

    One file, or several with an index, or the given `files`; names may be those of older or newer
    versions. Raises
    FileNotFoundError or WeightsError.
    """
    folder = Path(folder)
    params = {}
    for file in files or _weight_files(folder):
        for name, x in tensors(file, dtype):
            if not name.endswith(".position_ids"):
                name = _current_name(name, shapes)
                params[name] = reshaped(x, shapes.get(name))
    match({name: x.shape for name, x in params.items()}, shapes, folder)
    return params


def _current_name(name, shapes):
    if name not in shapes:
        for old, new in OLD_NAMES:
            renamed = old.sub(new, name)
            if renamed in shapes:
                return renamed
    return name


def _weight_files(folder):
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            file = folder / f"{stem}{variant}.safetensors"
            if file.exists():
                return [file]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                try:
                    names = sorted(set(read_json(index)["weight_map"].values()))
                    if outside := [name for name in names if Path(name).name != name]:
                        raise ValueError(f"{brief(outside[0])} is not the name of a file beside it")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise WeightsError(
                        f"{shown(index)}: not an index of weights: {shown(error)!r:.200}"
                    ) from None
                if missing := [name for name in names if not (folder / name).exists()]:
                    raise FileNotFoundError(
                        f"{shown(index)}: missing beside it: {some(missing)}; fetch it again"
                    )
                return [folder / name for name in names]
    named_otherwise = sorted(folder.glob("[!.]*.safetensors"))  # such as .non_ema.safetensors
    if len(named_otherwise) == 1:
        return named_otherwise
    if named_otherwise:
        names = some([file.name for file in named_otherwise])
        raise WeightsError(
            f"{folder}: expected one file of weights, found {names}; give the one to read the name "
            "diffusion_pytorch_model.safetensors"
        )
    for file in sorted(folder.glob("*")):
        if file.suffix in PICKLES:
            raise WeightsError(f"{file}: {PICKLED}")
    raise FileNotFoundError(
        f"{folder}: no weights; expected diffusion_pytorch_model.safetensors or model.safetensors"
    )
