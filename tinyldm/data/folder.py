"""A folder of images as a data set: any sizes, captions from where they are usually kept."""

import contextlib
import csv
import glob
import io
import json
import os
import posixpath
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinyldm.data.dataset import DataError, Dataset
from tinyldm.data.images import as_rgb, both_sides, fitted
from tinyldm.files import is_regular, shown, without_doubles
from tinyldm.threads import map_threads

FORMATS = {  # suffix of a file → a format that is read, whichever of these suffixes it has
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF",
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"  # what it begins with
OF_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")
BEGUN = (PNG[:4], b"\xff\xd8\xff", b"GIF8")  # so no other files begin
METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "text")  # of metadata
MOST_NAMED = 5  # problems in a message
LONGEST_TEXT = 2**16  # bytes of a caption
TOO_LONG = f"expected a caption of at most {LONGEST_TEXT:,} bytes, found {{:,}}"
MAP = ".map"  # at the end of the name of an image's layout map
MOST_PIXELS = 64_000_000  # of one image; a larger one is a mistake, or meant to fill the memory


def load_folder(
    folder: str | Path,
    size: int | tuple[int, int],
    skip_bad: bool = False,
    maps: bool = False,
) -> Dataset:
    """Load all images below `folder`, in the order of their names, as `open_image` reads them.

    An image's caption is its line (`file_name`, `text`) in the metadata.jsonl or metadata.csv of
    its folder or one above, else the text file of its name, else the name of its sub-folder, else
    "". Hidden files are ignored, and links are followed.

    maps: an image a.png has its layout map in a.map.png, cropped and resized in the same way.

    Every file is read before any training. DataError names five that cannot be used, and
    says how many there are; with `skip_bad` they are left out and all listed in `skipped`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing of that name"
        raise DataError(
            f"{shown(folder)}: expected a folder of images, found {found}; files that are read are "
            "IDX, CIFAR-10's .bin and .npz"
        )
    height, width = both_sides(size)
    files, others, metadata, notes = _find(folder)
    if maps:
        files = [file for file in files if not file.stem.endswith(MAP)]
    listed, damaged = _read_metadata(folder, files, metadata)

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
        rest = [f"and {len(damaged) - MOST_NAMED} more"] * (len(damaged) > MOST_NAMED)
        raise DataError(
            f"{shown(folder)}: {len(damaged)} problems with {len(files)} images and their "
            "captions; mend or remove them, or train without them (--skip-bad):\n  "
            + "\n  ".join([*damaged[:MOST_NAMED], *rest])
        )
    if not good:
        raise DataError(f"{shown(folder)}: none of its {len(files)} images can be read")
    images, layouts, enlarged, captions, sources = zip(*(results[i] for i in good), strict=True)
    notes = [*notes, f"captions: {_count(sources)}"]
    if any(enlarged):
        pixels = f"{height}×{width}" if height != width else height
        notes.append(f"{sum(enlarged)} of {len(good)} images are enlarged to {pixels} pixels")
    if others:
        notes.append(f"files of other kinds, ignored: {_count(others)}")
    names = [shown(files[i].relative_to(folder).as_posix()) for i in good]
    layouts = np.stack(layouts) if maps else None
    return Dataset(np.stack(images), list(captions), names, tuple(notes), tuple(damaged), layouts)


def holds_images(folder: Path) -> bool:
    """Return whether the name of any file below the folder has the suffix of an image format."""
    files = files_below(folder) if folder.is_dir() else []
    return any(path.suffix.lower() in FORMATS for path in files)


def files_below(folder: Path) -> list[Path]:
    """List the files below a folder in the order of their names, without hidden ones.

    Links are followed to folders that are not listed already. DataError for a folder that cannot be
    read.
    """
    found, seen = [], set()
    folders, links = [folder], []
    try:
        while folders or links:  # links last: what lies in the folder has its own name
            current = folders.pop() if folders else links.pop(0)
            real = current.resolve()
            if real in seen:
                continue
            seen.add(real)
            for path in sorted(current.iterdir()):
                if path.name.startswith("."):
                    continue
                if path.is_dir() and path.name not in METADATA:  # that is told where it is read
                    (links if path.is_symlink() else folders).append(path)
                else:
                    found.append(path)
    except OSError as error:
        raise DataError(f"{shown(error.filename)}: {error.strerror}") from None
    return sorted(found)


def open_image(file: Path, side: int, ground: str | None = "white") -> Image.Image:
    """Read one image as `as_rgb` converts it, of at least 2·side pixels if it has them.

    Of an animation the first frame is read. DataError says in one line why a file cannot be used.
    """
    kinds = ", ".join(dict.fromkeys(FORMATS.values()))
    try:
        if not is_regular(file):
            raise ValueError("expected a file, found a device or a pipe")
        try:
            return _decoded(file, side, ground)
        except Exception:  # perhaps of its notes, which no viewer reads
            with open(file, "rb") as stream:
                if stream.read(8) != PNG:
                    raise
                chunks = stream.read()
        with contextlib.suppress(Exception):  # perhaps of these two, without which it is shown
            return _decoded(_only(chunks, *OF_PIXELS, b"iCCP", b"eXIf"), side, ground)
        return _decoded(_only(chunks, *OF_PIXELS), side, ground)
    except UnidentifiedImageError:
        with open(file, "rb") as stream:
            start = stream.read(4)
        if start and not start.startswith(BEGUN):
            reason = f"not an image in a format that is read ({kinds})"
        else:
            reason = "an image that is cut off or damaged" if start else "not an image: empty"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # decoders of damaged bytes raise whatever they stumble over
        reason = str(error) or type(error).__name__
    raise DataError(f"{shown(file)}: {reason}")


def _decoded(file, side, ground):
    formats = tuple(FORMATS.values())
    with Image.open(file, formats=formats) as opened:
        if opened.width * opened.height > MOST_PIXELS:
            raise ValueError(
                f"expected at most {MOST_PIXELS // 10**6} million pixels, found "
                f"{opened.width}×{opened.height}"
            )
        opened.verify()  # the checksums of PNG, which reading alone ignores
    with Image.open(file, formats=formats) as opened:
        opened.draft(None, (2 * side, 2 * side))  # JPEG: decode no more of it than is needed
        return as_rgb(opened, ground)


def _only(chunks, *kinds):
    """Make a PNG of only these kinds of its chunks."""
    kept, at = [PNG], 0
    while at < len(chunks):
        end = at + 12 + int.from_bytes(chunks[at : at + 4], "big")
        if chunks[at + 4 : at + 8] in kinds:
            kept.append(chunks[at:end])
        at = end
    return io.BytesIO(b"".join(kept))


def _map_of(file, image, size):
    found = [
        layout
        for stem in _spellings(file.stem)
        for layout in sorted(file.parent.glob(f"{glob.escape(stem)}{MAP}.*"))
    ]
    found = [layout for layout in found if layout.suffix.lower() in FORMATS]
    if not found:
        raise DataError(
            f"{shown(file)}: has no map; expected {shown(file.stem)}{MAP}{file.suffix} beside it"
        )
    if len(found) > 1:
        raise DataError(f"{shown(file)}: has {len(found)} maps; keep one")
    layout = open_image(found[0], max(both_sides(size)))
    if abs(layout.width * image.height - layout.height * image.width) > max(image.size):
        raise DataError(
            f"{shown(found[0])}: expected the proportions of its image, {image.height}×"
            f"{image.width}, found {layout.height}×{layout.width}"
        )
    return fitted(layout, size)


def _count(kinds):
    return ", ".join(f"{number} {kind}" for kind, number in Counter(kinds).most_common())


def _find(folder):
    """Find the files below a folder → images, suffixes of others, metadata files, remarks."""
    images, texts, others, metadata, outside = [], [], [], [], 0
    real = folder.resolve()
    for path in files_below(folder):
        outside += not path.resolve().is_relative_to(real)
        if path.suffix.lower() in FORMATS:
            images.append(path)
        elif path.name in METADATA:
            metadata.append(path)
        elif path.suffix == ".txt":
            texts.append(path)
        else:
            others.append(shown(path.suffix or path.name))
    if not images:
        raise DataError(
            f"{shown(folder)}: no image among its {len(others)} files; formats read are "
            f"{', '.join(FORMATS)}"
        )
    notes = [f"{outside} files are reached by links that lead out of the folder"] if outside else []
    named = {_key(image) for image in images}
    if lonely := [shown(text.name) for text in texts if _key(text) not in named]:
        notes.append(f"{len(lonely)} .txt files, such as {lonely[0]}, are named like no image")
    return images, others, metadata, notes


def _caption(file, folder, listed):
    """Find an image's caption → the caption, where it is from."""
    name = file.relative_to(folder).as_posix()
    if name in listed:
        return listed[name]
    for stem in _spellings(file.stem):
        text = file.with_name(f"{stem}.txt")
        if os.path.lexists(text):  # or a link that leads nowhere
            return read_text(text, LONGEST_TEXT).strip(), "from .txt files"
    if file.parent == folder:
        return "", "images without one"
    name = os.fsencode(file.parent.name).decode(errors="replace")  # of any bytes
    return name.replace("_", " "), "from the name of a sub-folder"


def _key(file):
    return unicodedata.normalize("NFC", str(file.with_suffix("")))


def _spellings(stem):
    """Return a name as it is, then composed and decomposed: file systems differ in that."""
    forms = [unicodedata.normalize(form, stem) for form in ("NFC", "NFD")]
    return dict.fromkeys([stem, *forms])


def read_text(file: Path, most: int | None = None) -> str:
    """Read a file of text in UTF-8, a caption of at most so many bytes, if they are limited.

    DataError says in one line why it cannot be read.
    """
    try:
        if not is_regular(file):
            raise DataError(f"{shown(file)}: expected a file of text, found something else")
        if most is not None and file.stat().st_size > most:
            raise DataError(f"{shown(file)}: {TOO_LONG.format(file.stat().st_size)}")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(file)}: expected text in UTF-8 ({error})") from None
    except OSError as error:
        raise DataError(f"{shown(file)}: {error.strerror}") from None


def _read_metadata(folder, images, files):
    """Read metadata files → ({image: (caption, where it is from)}, [what is wrong with a line]).

    Images are named from `folder` on. Of two lines for one image the one nearer to it counts.
    """
    names = [image.relative_to(folder).as_posix() for image in images]
    known = {unicodedata.normalize("NFC", name): name for name in names} | {n: n for n in names}
    listed, damaged, here = {}, [], {}
    for file in sorted(files, key=lambda file: len(file.parts)):
        entries = _csv_lines if file.suffix == ".csv" else _json_lines
        for number, entry, problem in entries(read_text(file)):
            where = f"{shown(file)}: line {number}"
            name, text = (entry.get(key) for key in COLUMNS)
            if not isinstance(name, str) or not isinstance(text, str):
                damaged.append(f"{where}: {problem}")
                continue
            name = posixpath.normpath((file.parent.relative_to(folder) / name).as_posix())
            image = known.get(name, known.get(unicodedata.normalize("NFC", name)))
            if image is None:
                damaged.append(f"{where}: there is no image {shown(name)!r:.200}")
            elif (size := len(text.encode("utf-8", "surrogatepass"))) > LONGEST_TEXT:
                damaged.append(f"{where}: {TOO_LONG.format(size)}")
            elif here.setdefault((file.parent, image), text) != text:
                damaged.append(f"{where}: a second text for {shown(name)!r:.200}; keep one")
            else:
                listed[image] = text, f"from {file.name}"
    return listed, damaged


def _json_lines(text):
    """Yield (number, content, what to say if it is not two texts) of lines of JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            problem = f'expected {{"file_name": …, "text": …}}, found {shown(line)!r:.200}'
            try:
                entry = json.loads(line, object_pairs_hook=without_doubles)
            except (ValueError, RecursionError) as error:
                entry, problem = None, f"{problem} ({shown(error)})"
            yield number, entry if isinstance(entry, dict) else {}, problem


def _csv_lines(text):
    """Yield the same of a table whose first line names the columns."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    names, number = None, 1
    try:
        for row in rows:
            line = f"{shown(','.join(row))!r:.200}"
            if names is None and not all(row.count(name) == 1 for name in COLUMNS):
                yield number, {}, f"expected columns file_name and text, once each, found {line}"
                return
            if names is None:
                names = row
            elif row:  # else the line is empty
                problem = f"expected {len(names)} columns, found {len(row)}: {line}; quote commas"
                alike = len(row) == len(names)
                yield number, dict(zip(names, row, strict=True)) if alike else {}, problem
            number = rows.line_num + 1
    except csv.Error as error:
        yield number, {}, f"expected CSV, found one that breaks off ({error}); is a quote open?"
