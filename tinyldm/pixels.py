"""Pictures as numbers: to and from the range of the autoencoder, and to the size of a model."""

import numpy as np
from PIL import Image


def from_uint8(pictures: np.ndarray) -> np.ndarray:
    """0…255 → float32 in −1…1, the range of the autoencoder."""
    return pictures.astype(np.float32) / 127.5 - 1


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """−1…1 → 0…255, rounded and clipped. ValueError for what is not a number."""
    if not np.isfinite(pictures).all():
        raise ValueError("the picture holds values that are not finite: the weights have diverged")
    return np.clip(np.round((pictures + 1) * 127.5), 0, 255).astype(np.uint8)


def picture_pixels(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """A PIL image, stretched to this size (Lanczos) → uint8 (height, width, 3)."""
    return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))


def mask_pixels(mask: Image.Image, height: int, width: int) -> np.ndarray:
    """A PIL image, stretched in the same way → bool (height, width): True where it is light."""
    return np.asarray(mask.convert("L").resize((width, height), Image.Resampling.LANCZOS)) >= 128


def similar_size(size: tuple[int, int], like: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width) in the proportions of `size`, about as many pixels as `like`, multiples."""
    scale = (like[0] * like[1] / (size[0] * size[1])) ** 0.5
    height, width = (max(1, round(side * scale / multiple)) * multiple for side in size)
    return height, width
