"""Images as arrays: to and from the range of the autoencoder, and to the size of a model."""

import contextlib
import io

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.Image import Transpose


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


def as_rgb(image: Image.Image, ground: str | None = "white") -> Image.Image:
    """Convert to RGB as a viewer shows it: upright, its colours in sRGB, on a white ground.

    Without a ground an image with transparent places becomes RGBA. 16-bit grey becomes 8 bits.
    ValueError for an image of floats.
    """
    if image.mode == "F":
        raise ValueError("expected an image of integers, found one of mode F")
    alpha = _alpha(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would only clip
        grey = np.asarray(image, np.float32) / 257
        grey = Image.fromarray(np.clip(np.round(grey), 0, 255).astype(np.uint8))
        grey.info = image.info
        rgb = _in_srgb(grey)
    else:
        rgb = _in_srgb(image)
    if alpha is not None and ground is None:
        rgb.putalpha(alpha)
    elif alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", image.size, ground), alpha)
    turned = _TURNS.get(_orientation(image))
    rgb = rgb if turned is None else rgb.transpose(turned)
    rgb.info.clear()  # all that they say has been done
    return rgb


def _alpha(image):
    """Return how opaque each pixel is, mode "L", or None where all are."""
    marked = image.info.get("transparency")
    if image.format == "PNG" and image.tile and marked is not None:
        # Pillow brings the levels to 8 bits, but not the one marked; once loaded none can tell.
        match image.tile[0][3]:
            case "L;2" | "L;4" as stored:
                marked *= 85 if stored == "L;2" else 17
            case "RGB;16B":
                marked = tuple(level >> 8 for level in marked)
        image.info["transparency"] = marked
    if image.mode.startswith("I") and isinstance(marked, int):  # this grey is transparent
        return Image.fromarray(255 * (np.asarray(image) != marked).astype(np.uint8))
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    if image.format == "BMP" and alpha.getextrema() == (0, 0):
        return None  # the fourth byte of many BMP is not used
    return alpha


def _in_srgb(image):
    """Apply the colour profile; one that is damaged or of other colours counts for nothing."""
    profile = image.info.get("icc_profile")
    if image.mode in ("LA", "La"):
        image = image.convert("LA").getchannel("L")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGBA").convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
            return ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
    return image.convert("RGB")


_TURNS = {  # EXIF orientation → what makes the image upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def _orientation(image):
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # EXIF data are damaged in any way; a viewer shows the image all the same
        return None


def image_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize a PIL image to this size (Lanczos) → uint8 (height, width, 3)."""
    return np.asarray(as_rgb(image).resize((width, height), Image.Resampling.LANCZOS))


def mask_pixels(mask: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize a mask in the same way → bool (height, width): True where it is light.

    What is transparent is not masked.
    """
    grey = as_rgb(mask, ground="black").convert("L")
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
