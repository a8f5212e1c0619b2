"""Weights on disk: safetensors files, read tensor by tensor into this package's memory layout.

A convolution kernel lies in a file as (c_out, c_in, kh, kw) and in memory as (kh, kw, c_in, c_out);
every other tensor is the same in both. The format is an 8-byte length, that many bytes of JSON
{name: {dtype, shape, data_offsets}}, and the raw little-endian values.
"""

import json
import math
import os
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from tinyldm.files import replacing
from tinyldm.nn.protocol import Params

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
OTHER_WIDTHS = {  # bytes of a value of the types that are not read, only passed over
    "BOOL": 1, "I8": 1, "I16": 2, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

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
        entries, start = _read_header(stream, file)
        for name, entry in entries.items():
            if names is None or name in names:
                if entry["dtype"] in OTHER_WIDTHS:
                    raise WeightsError(
                        f"{file}: tensor {name}: dtype {entry['dtype']} is not supported"
                    )
                begin, end = entry["data_offsets"]
                stream.seek(start + begin)
                yield name, _to_memory(_decode(stream.read(end - begin), entry), dtype)


def tensor_shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} from the header alone, with kernels as (kh, kw, c_in, c_out)."""
    with open(file, "rb") as stream:
        entries, _ = _read_header(stream, file)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return {n: tuple(s[i] for i in (2, 3, 1, 0)) if len(s) == 4 else s for n, s in shapes.items()}


def load_metadata(file: str | Path) -> dict[str, str]:
    """Read the {key: text} notes in a .safetensors header. Raises as `load_weights` does."""
    with open(file, "rb") as stream:
        return _parse_header(stream, file).get("__metadata__", {})


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
    """Return all tensors' entries, checked: known dtype, no overlap, no hole, nothing left over."""
    header = _parse_header(stream, file)
    start = stream.tell()
    size = os.fstat(stream.fileno()).st_size - start
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    position = 0
    try:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            shape, code = entry["shape"], entry["dtype"]
            if code != "BF16" and code not in DTYPES and code not in OTHER_WIDTHS:
                raise WeightsError(f"{file}: tensor {name}: dtype {code} is not supported")
            if not _is_shape(shape):
                raise WeightsError(f"{file}: tensor {name}: shape {shape} is not valid")
            width = OTHER_WIDTHS.get(code) or (
                2 if code == "BF16" else np.dtype(DTYPES[code]).itemsize
            )
            whole = type(begin) is type(end) is int
            if not whole or begin != position or end - begin != math.prod(shape) * width:
                raise WeightsError(
                    f"{file}: tensor {name}: bytes {begin}…{end} do not fit {code} {shape} "
                    f"at {position}"
                )
            position = end
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{file}: the header does not describe its tensors: {error!r}") from None
    if position != size:
        raise WeightsError(f"{file}: expected {position} bytes of tensor data, found {size}")
    return entries, start


def _is_shape(shape):
    """Return whether NumPy accepts this shape: it limits axes, and bytes even next to a 0."""
    return (
        isinstance(shape, list)
        and len(shape) <= 64
        and all(type(side) is int and side >= 0 for side in shape)
        and math.prod(side or 1 for side in shape) < 2**60
    )


def _parse_header(stream, file):
    size = os.fstat(stream.fileno()).st_size
    first = stream.read(8)
    length = int.from_bytes(first, "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        if first.startswith((b"PK\x03\x04", b"\x80")):  # a torch archive, or an older one
            raise WeightsError(f"{file}: {PICKLED}")
        raise WeightsError(f"{file}: not a safetensors file, or cut off")
    try:
        header = json.loads(stream.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise WeightsError(f"{file}: the header is not a JSON object")
    notes = header.get("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise WeightsError(f"{file}: __metadata__ is not an object of strings")
    return header


def _unique(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _decode(data, entry):
    if entry["dtype"] == "BF16":  # the upper half of a float32
        bits = np.frombuffer(data, "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(entry["shape"])
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
