"""Grids, strips and animations: where the pixels land, and that nothing makes them fail."""

import numpy as np
import pytest
from PIL import Image

from tinyldm.evaluation.figures import (
    PAPER,
    enlarge,
    grid,
    latents_as_images,
    save_animation,
    save_image,
)

GAP = 4


def images_of(n, h=8, w=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def tiles_of(sheet, n, h, w, columns, left=GAP, extra=0):
    """The tile of each image cut out of a sheet, from the rule of the layout alone."""
    pixels = np.asarray(sheet)
    tops = [GAP + i // columns * (h + GAP + extra) for i in range(n)]
    lefts = [left + i % columns * (w + GAP) for i in range(n)]
    return [pixels[y : y + h, x : x + w] for y, x in zip(tops, lefts, strict=True)]


# -------------------------------------------------------------------------------------------- grid


@pytest.mark.parametrize(
    ("n", "columns", "expected"),
    [(1, None, (1, 1)), (4, None, (2, 2)), (5, None, (3, 2)), (6, 6, (6, 1)), (7, 3, (3, 3)),
     (2, 6, (2, 1)), (9, 9, (9, 1)), (18, 6, (6, 3))],
)  # fmt: skip
def test_a_grid_has_its_images_in_rows(n, columns, expected):
    images = images_of(n)
    sheet = grid(images, columns=columns, tile=24)
    in_a_row, rows = expected
    assert sheet.size == (GAP + in_a_row * (24 + GAP), GAP + rows * (24 + GAP))
    found = tiles_of(sheet, n, 24, 24, in_a_row)
    for tile, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(tile, image.repeat(3, 0).repeat(3, 1))
    assert np.asarray(sheet)[:GAP].tolist() == [[list(PAPER)] * sheet.width] * GAP


@pytest.mark.parametrize(
    ("h", "w", "tile", "scale"), [(8, 12, 24, 2), (32, 32, 96, 3), (5, 5, 24, 5), (99, 20, 24, 1)]
)
def test_tiles_are_enlarged_by_an_integer(h, w, tile, scale):
    images = images_of(2, h, w)
    before = images.copy()
    sheet = grid(images, columns=2, tile=tile)
    for found, image in zip(tiles_of(sheet, 2, h * scale, w * scale, 2), images, strict=True):
        np.testing.assert_array_equal(found, image.repeat(scale, 0).repeat(scale, 1))
    np.testing.assert_array_equal(images, before)


def test_a_caption_as_long_as_a_book_is_cut():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    sheet = grid(images, ["a word " * 10_000], tile=24)
    assert sheet.size == grid(images, ["a word " * 28 + "abc…"], tile=24).size
    assert np.array_equal(sheet, grid(images, ["a word " * 28 + "a w…"], tile=24))


def test_captions_lie_under_their_images_and_cover_none():
    images = images_of(3, 24, 24)
    plain = grid(images, columns=2, tile=24)
    sheet = grid(images, ["a", "bb cc dd ee", ""], columns=2, tile=24)
    extra = sheet.height - plain.height  # the second row says nothing, and takes no space for it
    assert sheet.width == plain.width and extra > 10
    for tile, image in zip(tiles_of(sheet, 3, 24, 24, 2, extra=extra), images, strict=True):
        np.testing.assert_array_equal(tile, image)
    under = np.asarray(sheet)[GAP + 24 : GAP + 24 + extra]
    first, second = under[:, GAP : GAP + 24], under[:, 2 * GAP + 24 : 2 * GAP + 48]
    assert first.min() < 128 and second.min() < 128


def test_labels_lie_to_the_left_of_their_rows():
    images = images_of(4, 24, 24)
    sheet = grid(images, columns=2, tile=24, labels=["first", "a second,\nand a longer one"])
    left = sheet.width - 2 * (24 + GAP)
    assert left > 40
    for tile, image in zip(tiles_of(sheet, 4, 24, 24, 2, left), images, strict=True):
        np.testing.assert_array_equal(tile, image)
    margin = np.asarray(sheet)[:, :left]
    for row in range(2):
        assert margin[GAP + row * 28 : GAP + row * 28 + 24].min() < 128


TEXTS = [
    "a" * 500,
    "many words " * 60,
    "ein größerer Kreis — «links»",
    "большой красный круг",
    "大きな赤い円",
    "🎨👩‍🚀",
    "\u202eright to left עברית",
    "tab\tand\nnew line",
    "\x00\x07",
    " ",
]


@pytest.mark.parametrize("text", TEXTS, ids=map(str, range(len(TEXTS))))
@pytest.mark.parametrize("shape", [(8, 8), (96, 96), (96, 3), (3, 96)])
def test_no_text_is_too_much(text, shape):
    images = images_of(2, *shape)
    scale = max(1, 96 // max(shape))
    plain = grid(images, columns=2)
    sheet = grid(images, [text, ""], columns=2)
    assert sheet.width == plain.width and sheet.height >= plain.height
    tiles = tiles_of(sheet, 2, shape[0] * scale, shape[1] * scale, 2)
    np.testing.assert_array_equal(tiles[0], enlarge(images, scale)[0])
    labelled = grid(images, columns=2, labels=[text])
    assert labelled.height == plain.height


# --------------------------------------------------------------------------- latents and enlarging


@pytest.mark.parametrize("channels", range(1, 9))
def test_latents_of_any_number_of_channels_can_be_seen(channels):
    rng = np.random.default_rng(channels)
    latents = rng.standard_normal((2, 3, 5, channels), dtype=np.float32)
    shown = latents_as_images(latents)
    assert (shown.shape, shown.dtype) == ((2, 3, 5, 3), np.uint8)
    expected = np.clip(127.5 + latents * 42.5, 0, 255)
    for i in range(3):
        channel = i if i < channels else 0  # too few channels: the first fills in
        assert abs(shown[..., i] - expected[..., channel]).max() <= 1


def test_latents_are_clipped():
    shown = latents_as_images(np.array([-1e9, -3, 0, 3, 1e9]).reshape(1, 1, 5, 1))
    assert shown[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255]


@pytest.mark.parametrize("factor", [1, 2, 5])
def test_enlarge_repeats_pixels(factor):
    images = images_of(2, 3, 4)
    large = enlarge(images, factor)
    assert large.shape == (2, 3 * factor, 4 * factor, 3)
    for dy in range(factor):
        for dx in range(factor):
            np.testing.assert_array_equal(large[:, dy::factor, dx::factor], images)


# ------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "JPG", "webp", "gif", "bmp"])
def test_images_are_saved_in_the_format_of_their_name(tmp_path, suffix):
    image = Image.fromarray(np.full((8, 8, 3), (200, 30, 90), np.uint8))
    file = tmp_path / "new" / f"a.{suffix}"
    save_image(file, image)
    with Image.open(file) as found:
        assert found.format == {"jpg": "JPEG"}.get(suffix.lower(), suffix.upper())
        assert abs(np.asarray(found.convert("RGB")).astype(int) - (200, 30, 90)).max() < 8


@pytest.mark.parametrize("name", ["a", "a.xyz", "a.", ".png"])
def test_a_name_that_says_no_format(tmp_path, name):
    """One line that names the file, and nothing written."""
    with pytest.raises(ValueError) as caught:
        save_image(tmp_path / name, Image.new("RGB", (4, 4)))
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    save_image(file, Image.new("RGB", (4, 4), "red"))
    before = file.read_bytes()

    def half(self, target, format=None, **options):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="a.png: no space"):
        save_image(file, Image.new("RGB", (4, 4), "blue"))
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


@pytest.mark.parametrize("suffix", ["webp", "gif"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_animations_rest_on_their_last_frame(tmp_path, suffix, n):
    colours = [(40 * i, 200 - 40 * i, 90) for i in range(n)]
    file = tmp_path / f"a.{suffix}"
    save_animation(file, [Image.new("RGB", (16, 16), c) for c in colours], 70, hold=900)
    durations = []
    with Image.open(file) as found:
        assert getattr(found, "n_frames", 1) == n
        for i, colour in enumerate(colours):
            found.seek(i)
            found.load()
            durations.append(found.info.get("duration", 0))
            middle = np.array(found.convert("RGB").getpixel((8, 8)))
            assert abs(middle - colour).max() < 12
        if n > 1:
            assert found.info["loop"] == 0  # for ever
            assert durations == [70] * (n - 1) + [900]
