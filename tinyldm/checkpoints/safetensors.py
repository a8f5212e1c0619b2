"""Weights on disk: safetensors files, read tensor by tensor into this package's memory layout.

A convolution kernel lies in a file as (c_out, c_in, kh, kw) and in memory as (kh, kw, c_in, c_out);
every other tensor is the same in both. The format is an 8-byte length, that many bytes of JSON
{name: {dtype, shape, data_offsets}}, and the raw little-endian values. The library of the format
checks a file; it has no bfloat16 without another library, so the values are read here.
"""

import json
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from tinyldm.files import replacing
from tinyldm.nn.protocol import Params

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
PICKLED = (
    "a pickle of torch, which can run any program when it is opened and is not opened here; turn "
    "it into safetensors where torch is installed: "
    """python -c "import sys, torch; from safetensors.torch import save_file; """
    """n = 'pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint'; """
    """torch.serialization.add_safe_globals([(type('Note', (), {}), n)]); """
    """d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); """
    """d = d.get('state_dict', d); """
    """save_file({k: x.clone().contiguous() for k, x in d.items() if torch.is_tensor(x)}, """
    """sys.argv[2])" OLD NEW.safetensors"""
)


class WeightsError(ValueError):
    """A file of weights is damaged or does not fit the model; the message lists everything."""


def load_weights(file: str | Path, dtype: DTypeLike | None = None) -> Params:
    """Read a .safetensors file into {name: array}, kernels as (kh, kw, c_in, c_out).

    dtype: what floating tensors become, by default what they are in the file (bfloat16, which
    NumPy lacks, becomes float32, exactly). Raises FileNotFoundError or WeightsError.
    """
    return dict(tensors(file, dtype))


def tensors(
    file: str | Path, dtype: DTypeLike | None = None, names: Container[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) of the tensors in a .safetensors file: all, or those in `names`."""
    with open(file, "rb") as stream:
        entries, _ = _read_header(stream, file)
        start = stream.tell()
        for name, entry in entries.items():
            if names is None or name in names:
                begin, end = entry["data_offsets"]
                stream.seek(start + begin)
                try:
                    array = _decode(stream.read(end - begin), entry)
                except ValueError as error:  # a dtype or a shape that NumPy does not have
                    raise WeightsError(f"{file}: tensor {name}: {error}") from None
                yield name, _to_memory(array, dtype)


def tensor_shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} from the header alone, with kernels as (kh, kw, c_in, c_out)."""
    with open(file, "rb") as stream:
        entries, _ = _read_header(stream, file)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return {n: tuple(s[i] for i in (2, 3, 1, 0)) if len(s) == 4 else s for n, s in shapes.items()}


def load_metadata(file: str | Path) -> dict[str, str]:
    """Read the {key: text} notes in a .safetensors header. Raises as `load_weights` does."""
    with open(file, "rb") as stream:
        return _read_header(stream, file)[1]


def save_weights(file: str | Path, params: Params, metadata: dict[str, str] | None = None) -> None:
    """Write {name: array} to a .safetensors file, the inverse of `load_weights`.

    The file appears whole or not at all: a temporary file is written, synced and renamed. Raises
    WeightsError for a dtype that `load_weights` would not read.
    """
    from safetensors.numpy import save_file

    tensors = {name: _to_file(np.asarray(array)) for name, array in params.items()}
    for name, array in tensors.items():
        if array.dtype.newbyteorder("<") not in map(np.dtype, DTYPES.values()):
            raise WeightsError(f"{file}: tensor {name}: dtype {array.dtype} is not supported")
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def match(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str | Path
) -> None:
    """Compare {name: shape} with those of a model; WeightsError lists everything that differs."""
    misshapen = [
        f"{name}: expected {expected[name]}, found {found[name]}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    problems = [
        f"{title} ({len(names)}): {', '.join(names)}"
        for title, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unexpected", sorted(found.keys() - expected.keys())),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{where}: the weights do not fit the config. " + "; ".join(problems))


def reshaped(x: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """Reshape a 1×1 kernel (1, 1, c_in, c_out) to the matrix (c_out, c_in), if `shape` is that."""
    if x.ndim == 4 and x.shape[:2] == (1, 1) and shape == x.shape[:1:-1]:
        return np.ascontiguousarray(x[0, 0].T)
    return x


def _read_header(stream, file):
    """Return {name: entry} of all tensors and the notes, of a file that the library finds sound."""
    from safetensors import SafetensorError, safe_open

    first = stream.read(8)
    try:
        with safe_open(file, "numpy"):
            pass
        header = stream.read(int.from_bytes(first, "little"))
        entries = json.loads(header, object_pairs_hook=_unique)
        notes = entries.pop("__metadata__", {})
        if not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("a tensor is not described by an object")
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        if first.startswith((b"PK\x03\x04", b"\x80")):  # a torch archive, or an older one
            raise WeightsError(f"{file}: {PICKLED}") from None
        raise WeightsError(f"{file}: not a safetensors file, or cut off ({error})") from None
    return entries, notes


def _unique(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _decode(data, entry):
    if entry["dtype"] == "BF16":  # the upper half of a float32
        bits = np.frombuffer(data, "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(entry["shape"])
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not supported")
    return np.frombuffer(data, DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _to_memory(array, dtype):
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    if dtype is None or array.dtype.kind != "f":
        dtype = array.dtype.newbyteorder("=")
    return np.array(array, dtype, order="C")  # a copy: what was read is a read-only buffer


def _to_file(array):
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    return np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
