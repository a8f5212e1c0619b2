"""Figures: grids, strips and animations of images, drawn with Pillow."""

import errno
import os
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from tinyldm.files import replacing

LONGEST_CAPTION = 200  # characters under an image
INK, PAPER = (40, 40, 40), (255, 255, 255)


def grid(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    tile: int = 96,
    labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
) -> Image.Image:
    """Arrange images, uint8 (n, h, w, 3), in rows, enlarged to about `tile` pixels → a PIL image.

    captions: a line of text, wrapped, under each, cut after 200 characters. labels: one to the left
    of each row. titles: one above each column.
    """
    n, h, w, _ = images.shape
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    scale = max(1, round(tile / max(h, w)))
    font = ImageFont.load_default(11)
    gap = 4
    lines = "\n".join(labels or []).split("\n")
    margin = max(74, *(round(font.getlength(line)) + 2 * gap for line in lines)) if labels else gap
    width = max(1, w * scale // 6)
    wrapped = [textwrap.fill(_cut(text), width) for text in captions] if captions else [""] * n
    text_height = 13 * max(text.count("\n") + 1 for text in wrapped) if captions else 0
    rows, cell_w = [wrapped[i : i + columns] for i in range(0, n, columns)], w * scale + gap
    tops = [gap + (16 if titles else 0)]
    for row in rows:  # one without captions takes no space for them
        tops.append(tops[-1] + h * scale + gap + (text_height if any(row) else 0))
    sheet = Image.new("RGB", (margin + columns * cell_w, tops[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles or []):
        draw.text((margin + column * cell_w, gap), title, INK, font)
    for i, image in enumerate(images):
        x, y = margin + i % columns * cell_w, tops[i // columns]
        enlarged = Image.fromarray(image).resize((w * scale, h * scale), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, y))
        if captions:
            draw.multiline_text((x, y + h * scale + 1), wrapped[i], INK, font, spacing=1)
    for row, label in enumerate(labels or []):
        draw.text((gap, tops[row] + h * scale // 2 - 6), label, INK, font)
    return sheet


def _cut(text):
    return text if len(text) <= LONGEST_CAPTION else text[: LONGEST_CAPTION - 1] + "…"


def latents_as_images(latents: np.ndarray) -> np.ndarray:
    """Show latents (n, h, w, c) as uint8 (n, h, w, 3): three channels, from −3 black to 3 white."""
    shown = np.zeros((*latents.shape[:3], 3), np.float32)
    channels = min(3, latents.shape[3])
    shown[..., :channels] = latents[..., :channels]
    if channels < 3:
        shown[..., channels:] = latents[..., :1]
    return np.clip(127.5 + shown * (127.5 / 3), 0, 255).astype(np.uint8)


def enlarge(images: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel of (n, h, w, 3)."""
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def image_format(file: Path) -> str:
    """Return the format that the name of a file asks for. ValueError where that is none."""
    known = Image.registered_extensions()
    kind = known.get(file.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{file}: expected the name of an image, such as {file.stem or 'a'}.png")
    return kind


def check_image(file: Path) -> None:
    """Raise ValueError or OSError where `save_image` would fail, as far as is known before."""
    kind = image_format(file)
    try:
        Image.new("RGB", (8, 8)).save(BytesIO(), format=kind)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: a {kind} does not hold colours ({error}); take .png") from None
    folder = next(place for place in file.absolute().parents if place.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK) or file.is_dir():
        raise OSError(errno.EACCES, "cannot be written", str(file))


def save_image(file: Path, image: Image.Image, notes: dict | None = None, **options) -> None:
    """Write a PIL image whole or not at all; the format is that of the name.

    notes: {key: text}, for a PNG. options: Pillow's, of the format.
    """
    kind = image_format(file)
    if notes and kind == "PNG":
        options["pnginfo"] = PngInfo()
        for key, text in notes.items():
            options["pnginfo"].add_itxt(key, text)
    with replacing(file) as temporary:
        image.save(temporary, format=kind, **options)


def save_animation(
    file: Path, frames: list[Image.Image], milliseconds: int = 80, hold: int = 1500
) -> None:
    """Write PIL images as an animated .webp or .gif that rests on the last one."""
    duration = [milliseconds] * (len(frames) - 1) + [hold]
    save_image(file, frames[0], save_all=True, append_images=frames[1:], duration=duration, loop=0)
