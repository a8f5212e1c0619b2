"""Images as arrays: to and from the range of the autoencoder, and to the size of a model."""

import numpy as np
from PIL import Image, ImageOps


def from_uint8(images: np.ndarray) -> np.ndarray:
    """Map 0…255 to float32 in −1…1, the range of the autoencoder."""
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Map −1…1 to 0…255, rounded and clipped; grey images (n, h, w, 1) get three equal channels.

    ValueError for values that are not finite.
    """
    if not np.isfinite(images).all():
        raise ValueError("the image holds values that are not finite: the weights have diverged")
    levels = np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)
    return levels.repeat(3, axis=-1) if levels.shape[-1] == 1 else levels


def in_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert pixels (n, h, w, 3) to this number of channels: 1 is grey, their brightness."""
    if channels != 1:
        return pixels
    red, green, blue = (pixels[..., i : i + 1] for i in range(3))
    return 0.299 * red + 0.587 * green + 0.114 * blue  # as Pillow does (ITU-R BT.601)


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size that is either that, or the side of a square."""
    return (size, size) if np.isscalar(size) else tuple(size)


def fitted(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """Crop an image at the centre to these proportions, and resize → uint8 (height, width, 3)."""
    height, width = both_sides(size)
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: EXIF orientation applied, 16-bit grey to 8, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("expected an image of integers, found one of mode F")
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would only clip
        gray = np.asarray(image, np.float32) / 257
        image = Image.fromarray(np.clip(np.round(gray), 0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize a PIL image to this size (Lanczos) → uint8 (height, width, 3)."""
    return np.asarray(as_rgb(image).resize((width, height), Image.Resampling.LANCZOS))


def mask_pixels(mask: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize a mask in the same way → bool (height, width): True where it is light."""
    grey = as_rgb(mask).convert("L")
    return np.asarray(grey.resize((width, height), Image.Resampling.LANCZOS)) >= 128


def similar_size(size: tuple[int, int], like: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return (height, width) in the proportions of `size`, about as many pixels as `like`.

    Both sides are multiples of `multiple`; a very narrow image keeps the number of pixels.
    """
    pixels = like[0] * like[1]
    scale = (pixels / (size[0] * size[1])) ** 0.5
    sides = [max(1, round(side * scale / multiple)) * multiple for side in size]
    if max(sides) * min(sides) > 1.5 * pixels:
        sides[sides.index(max(sides))] = max(1, pixels // min(sides) // multiple) * multiple
    return sides[0], sides[1]
