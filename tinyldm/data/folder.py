"""A folder of images as a data set: any sizes, captions from where they are usually kept."""

import glob
import json
import posixpath
import warnings
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinyldm.data.dataset import DataError, Dataset
from tinyldm.data.images import as_rgb, both_sides, fitted
from tinyldm.threads import map_threads

FORMATS = {  # suffix of a file → a format that is read, whichever of these suffixes it has
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF",
}  # fmt: skip
MAP = ".map"  # at the end of the name of an image's layout map
MOST_PIXELS = 64_000_000  # of one image; a larger one is a mistake, or meant to fill the memory


def load_folder(
    folder: str | Path,
    size: int | tuple[int, int],
    skip_bad: bool = False,
    maps: bool = False,
) -> Dataset:
    """Load all images below `folder`, in the order of their names, as `open_image` reads them.

    An image's caption is its line (`file_name`, `text`) in metadata.jsonl, else the text file of
    its name, else the name of its sub-folder, else "". Hidden files are ignored.

    maps: an image a.png has its layout map in a.map.png, cropped and resized in the same way.

    Every file is read before any training. DataError names all that cannot be used; with
    `skip_bad` they are left out and listed in `skipped`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing of that name"
        raise DataError(
            f"{folder}: expected a folder of images, found {found}; files that are read are IDX, "
            "CIFAR-10's .bin and .npz"
        )
    height, width = both_sides(size)
    files, others = _find(folder)
    if maps:
        files = [file for file in files if not file.stem.endswith(MAP)]
    listed, damaged = _read_metadata(folder, files)

    def read(file):
        try:
            image = open_image(file, max(height, width))
            enlarged = image.height < height or image.width < width
            layout = _map_of(file, image, size) if maps else None
            return fitted(image, size), layout, enlarged, *_caption(file, folder, listed)
        except DataError as error:
            return error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about notes in files that are not used here
        results = map_threads(read, files)
    damaged += [str(result) for result in results if isinstance(result, DataError)]
    good = [i for i, result in enumerate(results) if not isinstance(result, DataError)]
    if damaged and not skip_bad:
        raise DataError(
            f"{folder}: {len(damaged)} problems with {len(files)} images and their captions; "
            "mend or remove them, or train without them (--skip-bad):\n  " + "\n  ".join(damaged)
        )
    if not good:
        raise DataError(f"{folder}: none of its {len(files)} images can be read")
    images, layouts, enlarged, captions, sources = zip(*(results[i] for i in good), strict=True)
    notes = [f"captions: {_count(sources)}"]
    if any(enlarged):
        pixels = f"{height}×{width}" if height != width else height
        notes.append(f"{sum(enlarged)} of {len(good)} images are enlarged to {pixels} pixels")
    if others:
        notes.append(f"files of other kinds, ignored: {_count(others)}")
    names = [files[i].relative_to(folder).as_posix() for i in good]
    layouts = np.stack(layouts) if maps else None
    return Dataset(np.stack(images), list(captions), names, tuple(notes), tuple(damaged), layouts)


def holds_images(folder: Path) -> bool:
    """Return whether the name of any file below the folder has the suffix of an image format."""
    return any(path.suffix.lower() in FORMATS for path in folder.rglob("*"))


def open_image(file: Path, side: int) -> Image.Image:
    """Read one image in RGB, of at least 2·side pixels if it has them.

    Its EXIF orientation is applied, transparency becomes white, and of an animation the first
    frame is read. DataError says in one line why a file cannot be used.
    """
    formats = tuple(FORMATS.values())
    try:
        with Image.open(file, formats=formats) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(
                    f"expected at most {MOST_PIXELS // 10**6} million pixels, found "
                    f"{opened.width}×{opened.height}"
                )
            opened.verify()  # the checksums of PNG, which reading alone ignores
        with Image.open(file, formats=formats) as opened:
            opened.draft(None, (2 * side, 2 * side))  # JPEG: decode no more of it than is needed
            return as_rgb(opened)
    except UnidentifiedImageError:
        reason = f"not an image in a format that is read ({', '.join(dict.fromkeys(formats))})"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # decoders of damaged bytes raise whatever they stumble over
        reason = str(error) or type(error).__name__
    raise DataError(f"{file}: {reason}")


def _map_of(file, image, size):
    found = sorted(file.parent.glob(f"{glob.escape(file.stem)}{MAP}.*"))
    found = [layout for layout in found if layout.suffix.lower() in FORMATS]
    if not found:
        raise DataError(f"{file}: has no map; expected {file.stem}{MAP}{file.suffix} beside it")
    layout = open_image(found[0], max(both_sides(size)))
    if abs(layout.width * image.height - layout.height * image.width) > max(image.size):
        raise DataError(
            f"{found[0]}: expected the proportions of its image, {image.height}×"
            f"{image.width}, found {layout.height}×{layout.width}"
        )
    return fitted(layout, size)


def _count(kinds):
    return ", ".join(f"{number} {kind}" for kind, number in Counter(kinds).most_common())


def _find(folder):
    """Find the image files below a folder, sorted, and the suffixes of the other files."""
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.is_dir():
            continue
        if path.suffix.lower() in FORMATS:
            files.append(path)
        elif path.suffix != ".txt" and path.name != "metadata.jsonl":
            others.append(path.suffix or path.name)
    if not files:
        raise DataError(
            f"{folder}: no image among its {len(others)} files; formats read are "
            f"{', '.join(FORMATS)}"
        )
    return files, others


def _caption(file, folder, listed):
    """Find an image's caption → the caption, where it is from."""
    name = file.relative_to(folder).as_posix()
    if name in listed:
        return listed[name], "from metadata.jsonl"
    text = file.with_suffix(".txt")
    if text.exists():
        return _read_text(text).strip(), "from .txt files"
    if file.parent == folder:
        return "", "images without one"
    return file.parent.name.replace("_", " "), "from the name of a sub-folder"


def _read_text(file):
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected text in UTF-8 ({error})") from None


def _read_metadata(folder, files):
    """Read metadata.jsonl → ({file name: caption}, [what is wrong with a line])."""
    file = folder / "metadata.jsonl"
    names = {image.relative_to(folder).as_posix() for image in files}
    listed, damaged = {}, []
    if not file.exists():
        return listed, damaged
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            damaged.append(
                f'{file}: line {number}: expected {{"file_name": …, "text": …}}, found {line!r}'
            )
            continue
        name = PurePosixPath(posixpath.normpath(name)).as_posix()  # "./a.png" is a.png
        if name not in names:
            damaged.append(f"{file}: line {number}: there is no image {name!r}")
        listed[name] = text
    return listed, damaged
