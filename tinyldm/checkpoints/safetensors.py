"""Weights on disk: safetensors files, read tensor by tensor into this package's memory layout.

A convolution kernel lies in a file as (c_out, c_in, kh, kw) and in memory as (kh, kw, c_in, c_out);
every other tensor is the same in both. The format is an 8-byte length, that many bytes of JSON
{name: {dtype, shape, data_offsets}}, and the raw little-endian values. The library of the format
checks a file; it has no bfloat16 without another library, so the values are read here. It writes
notes in another order each time, so files are written here: equal weights give equal bytes.

Files written here have a checksum among their notes, of all tensors and of the other notes. It is
compared whenever the whole file is read: no flipped bit goes unseen.
"""

import contextlib
import json
import zlib
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from tinyldm.files import is_regular, replacing, shown, some, without_doubles
from tinyldm.nn.protocol import Params

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}

NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
CHECKSUM = "crc"  # the note that has it
ROW, ROWS = 255, 128  # words of 8 bytes, and rows that are folded together
LEAST_FOLDED = 2**14  # bytes: a CRC of fewer is as fast
LONGEST_HEADER = 2**24  # bytes; that of Stable Diffusion has 2¹⁷
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
PICKLE_STARTS = b"PK\x03\x04", b"\x80"  # of a torch archive, and of an older one
OTHERS = {  # how they start → what they are
    b"version ": "a pointer of Git LFS; fetch the file itself: git lfs pull",
    b"<!DOCTYP": "a web page; download the file itself",
    b"<!doctyp": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
    b"GGUF": "a GGUF file, which is not read here",
    b"\x89PNG": "an image",
}
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
    """A file of weights is damaged or does not fit the model."""


class Damaged(WeightsError):
    """A file of weights is cut off, or has changed since it was written."""


def load_weights(file: str | Path, dtype: DTypeLike | None = None) -> Params:
    """Read a .safetensors file into {name: array}, kernels as (kh, kw, c_in, c_out).

    dtype: what floating tensors become, by default what they are in the file (bfloat16, which
    NumPy lacks, becomes float32, exactly). Raises FileNotFoundError or WeightsError.
    """
    return dict(tensors(file, dtype))


def tensors(
    file: str | Path, dtype: DTypeLike | None = None, names: Container[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) of the tensors in a .safetensors file: all, or those in `names`.

    With all of them, a file that has changed since it was written here raises WeightsError at the
    end.
    """
    with _opened(file) as stream:
        entries, notes = _read_header(stream, file)
        start, checked = stream.tell(), names is None and CHECKSUM in notes
        crc = _of_header(entries, notes) if checked else 0
        for name in sorted(entries):
            if names is None or name in names:
                entry = entries[name]
                begin, end = entry["data_offsets"]
                stream.seek(start + begin)
                data = np.empty(end - begin, np.uint8)
                for part in _parts(data):
                    stream.readinto(part)
                    if checked:
                        crc = _of_part(crc, part)  # which is still in the cache
                try:
                    array = _decode(data, entry)
                except ValueError as error:  # a dtype or a shape that NumPy does not have
                    raise WeightsError(f"{shown(file)}: tensor {shown(name)}: {error}") from None
                yield name, _to_memory(array, dtype)
    if checked and notes[CHECKSUM] != f"{crc:08x}":
        before = shown(notes[CHECKSUM][:8])
        raise Damaged(
            f"{shown(file)}: damaged: its checksum was {before} when it was written and is "
            f"{crc:08x} now; take a copy of it, or train again"
        )


def _of_header(entries, notes):
    """Begin a CRC with what the header says but for where the tensors lie."""
    tensors = [[name, entries[name]["dtype"], *entries[name]["shape"]] for name in sorted(entries)]
    others = sorted((key, text) for key, text in notes.items() if key != CHECKSUM)
    return zlib.crc32(repr((tensors, others)).encode())


def _parts(data):
    """Cut bytes into what is folded together: 128 rows of 255 words, and what is left or small."""
    end = len(data) // (8 * ROW) * 8 * ROW if len(data) >= LEAST_FOLDED else 0
    rows = data[:end].view(np.uint64).reshape(-1, ROW)
    yield from (rows[i : i + ROWS] for i in range(0, len(rows), ROWS))
    yield data[end:]


def _of_part(crc, part):
    """Go on with a CRC: over rows it is one over their exclusive or, in a fraction of the time.

    A flipped bit flips one bit of that; two flips hide each other at the same bit of the same
    column alone. Rows are no power of two long, so that pages of a disk that changed places show.
    """
    return zlib.crc32(np.bitwise_xor.reduce(part) if part.ndim == 2 else part, crc)


def tensor_shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} from the header alone, with kernels as (kh, kw, c_in, c_out)."""
    with _opened(file) as stream:
        entries, _ = _read_header(stream, file)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return {n: tuple(s[i] for i in (2, 3, 1, 0)) if len(s) == 4 else s for n, s in shapes.items()}


def load_metadata(file: str | Path) -> dict[str, str]:
    """Read the {key: text} notes in a .safetensors header. Raises as `load_weights` does."""
    with _opened(file) as stream:
        return _read_header(stream, file)[1]


def checksum_noted(file: str | Path) -> str | None:
    """Return the checksum that a file from here notes, from the start of its header alone."""
    start = b'{"__metadata__":'
    with _opened(file) as stream:
        stream.seek(8)
        head = stream.read(2**12)
    if not head.startswith(start):
        return None
    with contextlib.suppress(ValueError):  # longer than any from here
        notes, _ = json.JSONDecoder().raw_decode(head.decode(errors="replace"), len(start))
        return notes.get(CHECKSUM) if isinstance(notes, dict) else None
    return None


def save_weights(file: str | Path, params: Params, metadata: dict[str, str] | None = None) -> None:
    """Write {name: array} to a .safetensors file, the inverse of `load_weights`.

    The file appears whole or not at all: a temporary file is written, synced and renamed. Raises
    WeightsError for a dtype that `load_weights` would not read, OSError where the disk is full.
    """
    arrays = {name: _to_file(np.asarray(array)) for name, array in params.items()}
    notes, entries, at = dict(metadata or {}), {}, 0
    for name, array in arrays.items():
        if array.dtype not in NAMES:
            raise WeightsError(f"{file}: tensor {name}: dtype {array.dtype} is not supported")
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # so all are aligned
    for name in order:
        array, end = arrays[name], at + arrays[name].nbytes
        dtype = NAMES[array.dtype]
        entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [at, end]}
        at = end
    crc = _of_header(entries, notes)
    for name in sorted(arrays):
        for part in _parts(arrays[name].reshape(-1).view(np.uint8)):
            crc = _of_part(crc, part)
    notes[CHECKSUM] = f"{crc:08x}"
    header = json.dumps({"__metadata__": notes} | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for name in order:
            stream.write(arrays[name].data)


def match(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str | Path
) -> None:
    """Compare {name: shape} with those of a model; WeightsError says what differs."""
    misshapen = [
        f"{name}: expected {expected[name]}, found {found[name]}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    problems = [
        f"{title} ({len(names)}): {some(names)}"
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


def _opened(file):
    if not is_regular(Path(file)):  # which might hang
        raise WeightsError(f"{shown(file)}: expected a file, found something else")
    return open(file, "rb")


def _read_header(stream, file):
    """Return {name: entry} of all tensors and the notes, of a file that the library finds sound."""
    from safetensors import SafetensorError, safe_open

    first = stream.read(8)
    too_long = int.from_bytes(first, "little") > LONGEST_HEADER
    of_pickle = too_long and first.startswith(PICKLE_STARTS)
    if too_long and not of_pickle:
        known = [what for start, what in OTHERS.items() if first.startswith(start)]
        what = known[0] if known else f"its header would be longer than {LONGEST_HEADER:,} bytes"
        raise Damaged(f"{shown(file)}: not a safetensors file: {what}")
    try:
        with safe_open(file, "numpy"):
            pass
        header = stream.read(int.from_bytes(first, "little"))
        entries = json.loads(header, object_pairs_hook=without_doubles)
        notes = entries.pop("__metadata__", None) or {}
        if not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("a tensor is not described by an object")
    except (SafetensorError, ValueError, RecursionError) as error:
        if of_pickle:
            raise WeightsError(f"{shown(file)}: {PICKLED}") from None
        raise Damaged(
            f"{shown(file)}: not a safetensors file, or cut off ({shown(error)})"
        ) from None
    return entries, notes


def _decode(data, entry):
    if entry["dtype"] == "BF16":  # the upper half of a float32
        bits = data.view("<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(entry["shape"])
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not supported")
    return data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _to_memory(array, dtype):
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    if dtype is None or array.dtype.kind != "f":
        dtype = array.dtype.newbyteorder("=")
    return np.asarray(array, dtype, order="C")


def _to_file(array):
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    # ascontiguousarray would give a scalar an axis
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")
