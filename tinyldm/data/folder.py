"""A folder of pictures as a data set: any sizes, captions from where they are usually kept."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class DataError(ValueError):
    """The data cannot be trained on; the message names the file and what to do."""


def load_folder(folder, side):
    """All pictures below `folder` → uint8 (n, side, side, 3), and their captions.

    A picture is turned as its EXIF note says, laid on white where it is transparent, cropped to the
    square in its middle and resized. Its caption is its line (`file_name`, `text`) in
    metadata.jsonl, else the text file of its name, else the name of its sub-folder, else "".
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of pictures, found nothing of that name")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS and p.is_file())
    if not files:
        raise DataError(f"{folder}: no picture in it; formats read are {', '.join(FORMATS)}")
    listed = _read_metadata(folder / "metadata.jsonl")
    images = np.empty((len(files), side, side, 3), np.uint8)
    captions = []
    for i, file in enumerate(files):
        images[i] = load_picture(file, side)
        captions.append(_caption(file, folder, listed))
    return images, captions


def load_picture(file, side):
    """One picture → uint8 (side, side, 3)."""
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would only clip
                gray = np.asarray(picture, np.float32) / 257
                picture = Image.fromarray(np.clip(np.round(gray), 0, 255).astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as a picture ({error}); remove it") from None
    return np.asarray(picture)


def _caption(file, folder, listed):
    name = file.relative_to(folder).as_posix()
    if name in listed:
        return listed[name]
    text = file.with_suffix(".txt")
    if text.exists():
        return _read_text(text).strip()
    return "" if file.parent == folder else file.parent.name.replace("_", " ")


def _read_text(file):
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected text in UTF-8 ({error})") from None


def _read_metadata(file):
    if not file.exists():
        return {}
    listed = {}
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if line.strip():
            try:
                entry = json.loads(line)
                name, text = entry["file_name"], entry["text"]
                if not isinstance(name, str) or not isinstance(text, str):
                    raise TypeError
                listed[name] = text
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f'{file}: line {number}: expected {{"file_name": …, "text": …}}, found {line!r}'
                ) from None
    return listed
