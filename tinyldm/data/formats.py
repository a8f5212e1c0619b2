"""Data sets that come as a few large files: IDX (MNIST and its kin), CIFAR-10's binary, and .npz.

Images are cropped at the centre and resized (Lanczos); grey ones become RGB. Captions are the
class names, where a list of them lies in the same folder, else the class numbers.
"""

import gzip
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm.data.dataset import DataError, Dataset
from tinyldm.data.folder import (
    LONGEST_TEXT,
    MOST_PIXELS,
    TOO_LONG,
    files_below,
    read_text,
)
from tinyldm.data.images import both_sides, fitted
from tinyldm.files import is_regular, shown, some
from tinyldm.threads import map_threads

CIFAR_SIDE, CIFAR_RECORD = 32, 1 + 3 * 32 * 32  # a label, then red, green and blue
CIFAR_NAMES = "batches.meta.txt"
IDX_NAMES = "labels.txt"  # one name per line; our own, as the format has none
UBYTE = 8  # the code of IDX for integers 0…255
ZIP = (b"PK\3\4", b"PK\5\6")  # start of an archive, and of one that holds nothing
MOST_BYTES = 8 * 2**30  # of one array; a header that says more is damaged


def find_arrays(path: Path) -> list[Path]:
    """Find the image files that `path` is, or holds, in one of these formats; or an empty list.

    Of a folder with training and test files it returns the training files, and of a file that is
    there both gzipped and not, the latter. They may lie in a folder below, as torchvision has them
    in MNIST/raw. DataError where they lie in several.
    """
    files = [path] if path.is_file() else files_below(path) if path.is_dir() else []
    found = [file for file in files if _reader(file)]
    if folders := sorted({shown(file.parent) for file in found})[1:]:
        raise DataError(
            f"{shown(path)}: data sets in several folders, {', '.join(folders[:3])} among them"
        )
    once = {}  # an array may be there as it is unpacked, too, or with a dot in place of a dash
    for file in sorted(found, key=lambda file: file.suffix == ".gz"):
        once.setdefault(file.name.removesuffix(".gz").replace(".idx3", "-idx3"), file)
    found = sorted(once.values())
    training = [file for file in found if file.name.startswith(("train", "data_batch"))]
    return training or found


def load_arrays(files: list[Path], size: int | tuple[int, int]) -> Dataset:
    """Load the images of these files, in order, cropped at the centre and resized.

    DataError says in one line what is wrong with a file. A note names the others of its folder.
    """
    try:
        parts = [_read(file) for file in files]
    except OSError as error:
        raise DataError(f"{shown(error.filename or files[0])}: {error.strerror or error}") from None
    pixels = [image for images, *_ in parts for image in images]
    captions = [caption for _, names, _ in parts for caption in names]
    if not pixels:
        raise DataError(f"{shown(files[0].parent)}: its {len(files)} files hold no image")
    images = np.stack(map_threads(lambda image: fitted(_rgb(image), size), pixels))
    kinds = f"{len(set(captions))} different"
    notes = [f"read {', '.join(shown(file.name) for file in files)}; captions: {kinds}"]
    notes += [note for *_, some in parts for note in some]
    beside = [file for file in sorted(files[0].parent.glob("[!.]*")) if _reader(file)]
    if unread := [file.name for file in beside if file not in files]:
        notes.append(f"not read: {some(unread)}; name one to read it alone")
    height, width = both_sides(size)
    if pixels[0].shape[0] < height or pixels[0].shape[1] < width:
        pixels = f"{height}×{width}" if height != width else height
        notes.append(f"the images are enlarged to {pixels} pixels")
    return Dataset(images, captions, [f"image {i}" for i in range(len(images))], tuple(notes))


def _read(file):
    """Read images (n, h, w) or (n, h, w, 3), captions and remarks."""
    if not is_regular(file):
        raise DataError(f"{shown(file)}: expected a file, found a device or a pipe")
    images, captions, notes = _reader(file)(file)
    if not 1 <= math.prod(images.shape[1:3]) <= MOST_PIXELS:
        raise DataError(f"{shown(file)}: its images are of {images.shape[1]}×{images.shape[2]}")
    return images, captions, notes


def _rgb(image):
    return Image.fromarray(image).convert("RGB")


def _reader(file: Path) -> Callable | None:
    name = file.name.removesuffix(".gz")
    if name.endswith(("-idx3-ubyte", ".idx3-ubyte")):
        return _read_idx
    if file.suffix == ".npz":
        return _read_npz
    if file.suffix == ".bin" and name.startswith(("data_batch", "test_batch")):
        return _read_cifar
    return None


# ---------------------------------------------------------------------------------------------- IDX


def _read_idx(file):
    """Read images (n, h, w) and captions; labels are in the file of the same name, labels-idx1."""
    images = read_idx(file, 3)
    name = file.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    label_files = [file.with_name(name + end) for end in ("", ".gz")]
    label_files = [file for file in label_files if os.path.lexists(file)]
    if not label_files:
        return images, [""] * len(images), []
    labels = read_idx(label_files[0], 1)
    if len(labels) != len(images):
        raise DataError(
            f"{shown(label_files[0])}: {len(labels)} labels for the {len(images)} images of "
            f"{shown(file.name)}; take both from the same data set"
        )
    return images, _named(labels, label_files[0], IDX_NAMES), []


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read the uint8 array in an IDX file, gzipped or not. DataError where it is something else."""
    if not is_regular(file):
        raise DataError(f"{shown(file)}: expected an IDX file, found a folder, device or pipe")
    try:
        with open(file, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(file) if zipped else open(file, "rb") as stream:
            magic = stream.read(4)
            if magic != bytes((0, 0, UBYTE, dimensions)):
                raise DataError(
                    f"{shown(file)}: expected an IDX file of bytes in {dimensions} dimensions, "
                    f"which begins with 0 0 {UBYTE} {dimensions}, found {' '.join(map(str, magic))}"
                )
            header = stream.read(4 * dimensions)
            shape = tuple(np.frombuffer(header[: len(header) // 4 * 4], ">i4").tolist())
            size = math.prod(shape)
            if len(shape) != dimensions or min(shape) < 0 or size > MOST_BYTES:
                raise DataError(f"{shown(file)}: its header is damaged: sizes {shape}")
            data = bytearray()  # which grows with the file, not with what its header says
            while len(data) <= size and (more := stream.read(min(2**20, size + 1 - len(data)))):
                data += more
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{shown(file)}: damaged or cut off ({error})") from None
    if len(data) != size:
        found = "more" if len(data) > size else f"{len(data):,}"
        raise DataError(f"{shown(file)}: expected {size:,} bytes for {shape}, found {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


# ------------------------------------------------------------------------------------ CIFAR and npz


def _read_cifar(file):
    size = file.stat().st_size
    if size == 0 or size % CIFAR_RECORD:
        raise DataError(
            f"{shown(file)}: expected records of {CIFAR_RECORD} bytes as of CIFAR-10's binary "
            f"version, found {size:,} bytes"
        )
    records = np.frombuffer(file.read_bytes(), np.uint8).reshape(-1, CIFAR_RECORD)
    planes = records[:, 1:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return images, _named(records[:, 0], file, CIFAR_NAMES), []


def _read_npz(file):
    """Read `images` (n, h, w) or (n, h, w, 3), uint8, and `captions` or `labels` (n,), if any."""
    try:
        with open(file, "rb") as stream:
            if stream.read(4) not in ZIP:
                raise ValueError("it is no zip archive")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as arrays:
                names = list(arrays.files)
                wanted = [name for name in names if name in ("images", "captions", "labels")]
                stored = {name: np.asarray(arrays[name]) for name in wanted}
    except Exception as error:  # whatever damaged bytes lead NumPy and zipfile to
        reason = "it holds Python objects" if "allow_pickle" in str(error) else shown(error)
        raise DataError(f"{shown(file)}: not an .npz of plain arrays ({reason})") from None
    images = stored.get("images")
    if images is None:
        raise DataError(
            f"{shown(file)}: expected an array `images`, found {some(names) or 'no array'}"
        )
    one_in_colour = images.ndim == 3 and images.shape[2] in (3, 4)
    of_images = images.ndim >= 3 and images.shape[3:] in ((), (1,), (3,)) and not one_in_colour
    if images.dtype != np.uint8 or not of_images:
        raise DataError(
            f"{shown(file)}: expected `images` of uint8 (n, h, w) or (n, h, w, 3), found "
            f"{images.dtype} {images.shape}"
        )
    images = images[..., 0] if images.shape[3:] == (1,) else images
    captions = stored.get("captions")
    if captions is None and "labels" in stored:
        labels = stored["labels"]
        if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
            raise DataError(
                f"{shown(file)}: expected `labels` of integers ({len(images)},), found "
                f"{labels.dtype} {labels.shape}"
            )
        captions = np.array(_named(labels.reshape(-1), file, IDX_NAMES))
    used = ("images", "captions" if "captions" in stored else "labels")
    unread = some([name for name in names if name not in used])
    notes = [f"{shown(file.name)}: not read: {unread}; captions are `captions`, else `labels`"]
    notes *= bool(unread)
    if captions is None:
        return images, [""] * len(images), notes
    if captions.dtype.kind not in "US" or captions.ndim != 1:
        raise DataError(
            f"{shown(file)}: expected `captions` of text (n,), found "
            f"{captions.dtype} {captions.shape}"
        )
    if captions.dtype.kind == "S":
        try:
            captions = np.char.decode(captions, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{shown(file)}: expected captions in UTF-8 ({error})") from None
    if len(captions) != len(images):
        raise DataError(f"{shown(file)}: {len(captions)} captions for {len(images)} images")
    captions = [str(caption) for caption in captions]
    longest = max((len(text.encode("utf-8", "surrogatepass")) for text in captions), default=0)
    if longest > LONGEST_TEXT:
        raise DataError(f"{shown(file)}: {TOO_LONG.format(longest)}")
    return images, captions, notes


def _named(labels, file, names_file):
    """Turn the class numbers of a file into captions: the class names, or the numbers.

    The names are in a file beside it, a line each.
    """
    least, most = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if least < 0:
        raise DataError(f"{shown(file)}: expected class numbers of 0 or more, found {least}")
    file = file.with_name(names_file)
    if not os.path.lexists(file):
        return [str(label) for label in labels.tolist()]
    # Not by splitlines(): it would end lines at rare characters within a name, too.
    names = [line.strip() for line in read_text(file).rstrip().split("\n")]
    if "" in names:
        raise DataError(f"{shown(file)}: line {names.index('') + 1} is empty: a class has no name")
    if most >= len(names):
        raise DataError(f"{shown(file)}: {len(names)} names, but there is a class {most}")
    return [names[label] for label in labels.tolist()]
