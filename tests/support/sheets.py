"""The images of a report's sheets, read back from the file in which they lie."""

import base64
from io import BytesIO

import numpy as np
from PIL import Image

LARGEST = 16_383  # pixels of a side of WebP


def tiles_of(sheet):
    """The images of a sheet, uint8 (rows, columns, h, w, 3)."""
    head, _, code = sheet["src"].partition(",")
    assert head == "data:image/webp;base64"
    image = np.asarray(Image.open(BytesIO(base64.b64decode(code))).convert("RGB"))
    names = ("rows", "columns", "across", "down", "h", "w")
    rows, columns, across, down, h, w = (sheet[name] for name in names)
    assert image.shape == (down * h, across * w, 3) and max(image.shape) <= LARGEST
    tiles = image.reshape(down, h, across, w, 3).swapaxes(1, 2).reshape(-1, h, w, 3)
    return tiles[: rows * columns].reshape(rows, columns, h, w, 3)
