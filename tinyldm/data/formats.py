"""Data sets that come as a few large files: IDX (MNIST and its kin), CIFAR-10's binary, and .npz.

Images are cropped at the centre and resized (Lanczos); grey ones become RGB. Captions are the
class names, where a list of them lies in the same folder, else the class numbers.
"""

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm.data.dataset import DataError, Dataset
from tinyldm.data.folder import MOST_PIXELS, files_below
from tinyldm.data.images import both_sides, fitted
from tinyldm.files import is_regular, shown
from tinyldm.threads import map_threads

CIFAR_SIDE, CIFAR_RECORD = 32, 1 + 3 * 32 * 32  # a label, then red, green and blue
CIFAR_NAMES = "batches.meta.txt"
IDX_NAMES = "labels.txt"  # one name per line; our own, as the format has none
UBYTE = 8  # the code of IDX for integers 0…255
MOST_BYTES = 8 * 2**30  # of one array; a header that says more is damaged


def find_arrays(path: Path) -> list[Path]:
    """Find the image files that `path` is, or holds, in one of these formats; or an empty list.

    Of a folder with training and test files it returns the training files. They may lie in a folder
    below, as torchvision has them in MNIST/raw. DataError where they lie in several.
    """
    files = [path] if path.is_file() else files_below(path) if path.is_dir() else []
    found = [file for file in files if _reader(file)]
    if folders := sorted({shown(file.parent) for file in found})[1:]:
        raise DataError(
            f"{path}: data sets in several folders, {', '.join(folders[:3])} among them"
        )
    training = [file for file in found if file.name.startswith(("train", "data_batch"))]
    return training or found


def load_arrays(files: list[Path], size: int | tuple[int, int]) -> Dataset:
    """Load the images of these files, in order, cropped at the centre and resized.

    DataError says in one line what is wrong with a file.
    """
    for file in files:
        if not is_regular(file):
            raise DataError(f"{shown(file)}: expected a file, found a device or a pipe")
    parts = [_reader(file)(file) for file in files]
    for file, (images, _) in zip(files, parts, strict=True):
        if not 1 <= math.prod(images.shape[1:3]) <= MOST_PIXELS:
            raise DataError(f"{shown(file)}: its images are of {images.shape[1]}×{images.shape[2]}")
    pixels = [image for images, _ in parts for image in images]
    captions = [caption for _, names in parts for caption in names]
    if not pixels:
        raise DataError(f"{files[0].parent}: its {len(files)} files hold no image")
    images = np.stack(map_threads(lambda image: fitted(_rgb(image), size), pixels))
    kinds = f"{len(set(captions))} different"
    notes = [f"read {', '.join(file.name for file in files)}; captions: {kinds}"]
    height, width = both_sides(size)
    if pixels[0].shape[0] < height or pixels[0].shape[1] < width:
        pixels = f"{height}×{width}" if height != width else height
        notes.append(f"the images are enlarged to {pixels} pixels")
    return Dataset(images, captions, [f"image {i}" for i in range(len(images))], tuple(notes))


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
    label_names = {
        file.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz") + end
        for end in ("", ".gz")
    }
    label_files = [file.with_name(name) for name in label_names if file.with_name(name).exists()]
    if not label_files:
        return images, [""] * len(images)
    labels = read_idx(label_files[0], 1)
    if len(labels) != len(images):
        raise DataError(
            f"{label_files[0]}: {len(labels)} labels for the {len(images)} images of "
            f"{file.name}; take both from the same data set"
        )
    return images, _named(labels, label_files[0], IDX_NAMES)


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read the uint8 array in an IDX file, gzipped or not. DataError where it is something else."""
    try:
        with open(file, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(file) if zipped else open(file, "rb") as stream:
            magic = stream.read(4)
            if magic != bytes((0, 0, UBYTE, dimensions)):
                raise DataError(
                    f"{file}: expected an IDX file of bytes in {dimensions} dimensions, which "
                    f"begins with 0 0 {UBYTE} {dimensions}, found {' '.join(map(str, magic))}"
                )
            header = stream.read(4 * dimensions)
            shape = tuple(np.frombuffer(header[: len(header) // 4 * 4], ">i4").tolist())
            size = math.prod(shape)
            if len(shape) != dimensions or min(shape) < 0 or size > MOST_BYTES:
                raise DataError(f"{file}: its header is damaged: sizes {shape}")
            data = bytearray()  # which grows with the file, not with what its header says
            while len(data) <= size and (more := stream.read(min(2**20, size + 1 - len(data)))):
                data += more
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: damaged or cut off ({error})") from None
    if len(data) != size:
        found = "more" if len(data) > size else f"{len(data):,}"
        raise DataError(f"{file}: expected {size:,} bytes for {shape}, found {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


# ------------------------------------------------------------------------------------ CIFAR and npz


def _read_cifar(file):
    size = file.stat().st_size
    if size == 0 or size % CIFAR_RECORD:
        raise DataError(
            f"{file}: expected records of {CIFAR_RECORD} bytes as of CIFAR-10's binary version, "
            f"found {size:,} bytes"
        )
    records = np.frombuffer(file.read_bytes(), np.uint8).reshape(-1, CIFAR_RECORD)
    planes = records[:, 1:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return images, _named(records[:, 0], file, CIFAR_NAMES)


def _read_npz(file):
    """Read `images` (n, h, w) or (n, h, w, 3), uint8, and `captions` or `labels` (n,), if any."""
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # whatever damaged bytes lead NumPy and zipfile to
        raise DataError(f"{file}: not an .npz of plain arrays ({error})") from None
    images = stored.get("images")
    if images is None:
        raise DataError(
            f"{file}: expected an array `images`, found {', '.join(stored) or 'no array'}"
        )
    one_in_colour = images.ndim == 3 and images.shape[2] in (3, 4)
    of_images = images.ndim >= 3 and images.shape[3:] in ((), (1,), (3,)) and not one_in_colour
    if images.dtype != np.uint8 or not of_images:
        raise DataError(
            f"{file}: expected `images` of uint8 (n, h, w) or (n, h, w, 3), found "
            f"{images.dtype} {images.shape}"
        )
    images = images[..., 0] if images.shape[3:] == (1,) else images
    captions = stored.get("captions")
    if captions is None and "labels" in stored:
        labels = stored["labels"]
        if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
            raise DataError(
                f"{file}: expected `labels` of integers ({len(images)},), found {labels.dtype} "
                f"{labels.shape}"
            )
        captions = np.array(_named(labels.reshape(-1), file, IDX_NAMES))
    if captions is None:
        return images, [""] * len(images)
    if captions.dtype.kind not in "US" or captions.ndim != 1:
        raise DataError(
            f"{file}: expected `captions` of text (n,), found {captions.dtype} {captions.shape}"
        )
    if captions.dtype.kind == "S":
        try:
            captions = np.char.decode(captions, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: expected captions in UTF-8 ({error})") from None
    if len(captions) != len(images):
        raise DataError(f"{file}: {len(captions)} captions for {len(images)} images")
    return images, [str(caption) for caption in captions]


def _named(labels, file, names_file):
    """Turn the class numbers of a file into captions: the class names, or the numbers.

    The names are in a file beside it, a line each.
    """
    least, most = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if least < 0:
        raise DataError(f"{file}: expected class numbers of 0 or more, found {least}")
    file = file.with_name(names_file)
    if not file.exists():
        return [str(label) for label in labels.tolist()]
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected text in UTF-8 ({error})") from None
    names = [line.strip() for line in lines]
    if "" in names:
        raise DataError(f"{file}: line {names.index('') + 1} is empty: a class has no name")
    if most >= len(names):
        raise DataError(f"{file}: {len(names)} names, but there is a class {most}")
    return [names[label] for label in labels.tolist()]
