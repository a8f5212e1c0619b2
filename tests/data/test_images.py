"""An image is what a viewer shows: colour profiles, transparency, orientation, damaged notes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tinyldm.data.dataset import DataError
from tinyldm.data.folder import open_image
from tinyldm.data.images import as_rgb, mask_pixels

# Colorants of Adobe RGB (1998) in the profile's own space, CIE XYZ under D50, and its gamma.
ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
GAMMA = 2.19921875


def profile(colorants=ADOBE, gamma=GAMMA, space=b"RGB "):
    """The bytes of an ICC profile: a matrix and one curve for all channels (ICC.1:2001-04)."""

    def fixed(*numbers):
        return struct.pack(f">{len(numbers)}i", *(round(65536 * number) for number in numbers))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    text = b"test\0"
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    tags[b"cprt"] = b"text" + bytes(4) + text
    if space == b"RGB ":
        for name, column in zip(b"rgb", colorants.T, strict=True):
            tags[bytes([name]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
            tags[bytes([name]) + b"TRC"] = curve
    else:
        tags[b"kTRC"] = curve
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(
        ">I4sI4s4s4s", start + len(data), bytes(4), 0x02100000, b"mntr", space, b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + data


def in_srgb(colour, colorants=ADOBE, gamma=GAMMA):
    """Convert levels to sRGB by the formulas of IEC 61966-2-1: the oracle of the profiles."""
    linear = np.linalg.solve(SRGB, colorants @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curve


def saved(image, file, **options):
    image.save(file, **options)
    return open_image(file, 8)


def chunk(kind, data, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png_of(width, bits, colour, row, transparent):
    """A PNG of one row, with the chunk of what is transparent."""
    head = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"tRNS", transparent)
    chunks += chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunks)


def level(image):
    return np.asarray(image)[3, 3].astype(int)


# --------------------------------------------------------------------------------- colour profiles


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("colour", [(200, 60, 60), (40, 90, 200), (128, 128, 128), (10, 250, 30)])
def test_a_colour_profile_is_applied(tmp_path, suffix, colour):
    options = {"lossless": True} if suffix == "webp" else {"quality": 100}
    image = Image.new("RGB", (8, 8), colour)
    found = saved(image, tmp_path / f"a.{suffix}", icc_profile=profile(), **options)
    assert abs(level(found) - in_srgb(colour)).max() <= 3


def test_a_known_colour(tmp_path):
    """A red of Display P3, as viewers show it."""
    image = Image.new("RGB", (8, 8), (200, 60, 60))
    found = saved(image, tmp_path / "a.png", icc_profile=profile(DISPLAY_P3, 2.2))
    assert abs(level(found) - (217, 42, 52)).max() <= 6  # its curve is not quite a power


def test_a_profile_of_grey_and_of_colours_with_alpha(tmp_path):
    grey = Image.new("L", (8, 8), 100)
    found = saved(grey, tmp_path / "a.png", icc_profile=profile(gamma=1.0, space=b"GRAY"))
    assert abs(level(found) - in_srgb((100,) * 3, SRGB, 1.0)).max() <= 2
    for other in (
        Image.new("LA", (8, 8), (100, 255)),
        Image.fromarray(np.full((8, 8), 100 * 257, "u2")),
    ):
        found = saved(other, tmp_path / "c.png", icc_profile=profile(gamma=1.0, space=b"GRAY"))
        assert abs(level(found) - in_srgb((100,) * 3, SRGB, 1.0)).max() <= 2
    half = Image.new("RGBA", (8, 8), (200, 60, 60, 51))
    found = saved(half, tmp_path / "b.png", icc_profile=profile())
    expected = 0.2 * in_srgb((200, 60, 60)) + 0.8 * 255
    assert abs(level(found) - expected).max() <= 2


@pytest.mark.parametrize(
    "bad", [b"", b"no profile", profile()[:150], profile(space=b"GRAY"), bytes(200)]
)
def test_a_profile_that_is_none_counts_for_nothing(tmp_path, bad):
    found = saved(Image.new("RGB", (8, 8), (200, 60, 60)), tmp_path / "a.png", icc_profile=bad)
    assert level(found).tolist() == [200, 60, 60]


# ------------------------------------------------------------------------------------ transparency


@pytest.mark.parametrize("alpha, expected", [(0, (255, 255, 255)), (255, (9, 8, 7)), (51, None)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "I;16"])
def test_transparency_lies_on_white(tmp_path, mode, alpha, expected):
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 9, 8, 7])
        options = {"transparency": bytes([255, alpha])}
    elif mode == "I;16":
        if alpha == 51:
            return  # of 16-bit grey one level is transparent, or none
        image = Image.fromarray(np.full((8, 8), 2056, np.uint16))
        options = {"transparency": 2056 if alpha == 0 else 7}
    else:
        image = Image.new("RGBA", (8, 8), (9, 8, 7, alpha)).convert(mode)
        options = {}
    if mode == "PA":
        found = as_rgb(image)
    else:
        found = saved(image, tmp_path / "a.png", **options)
    on_white = np.array((9, 8, 7)) if expected is None else np.array(expected)
    if mode in ("LA", "I;16") and alpha:
        on_white = np.full(3, 8)
    if expected is None:
        on_white = 0.2 * on_white + 0.8 * 255
    assert abs(level(found) - on_white).max() <= 1


@pytest.mark.parametrize("ground, clear", [("white", 255), ("black", 0)])
@pytest.mark.parametrize(
    "bits, levels, marked, expected",
    [
        (1, [0, 1], 1, [0, None]),
        (2, [0, 1, 2, 3], 1, [0, None, 170, 255]),
        (4, [0, 5, 10, 15], 5, [0, None, 170, 255]),
        (8, [0, 5, 85, 255], 85, [0, 5, None, 255]),
        (16, [0, 257, 514, 65535], 514, [0, 1, None, 255]),
    ],
)
def test_a_transparent_level_of_any_depth(bits, levels, marked, expected, ground, clear):
    row = sum(level << bits * i for i, level in enumerate(levels[::-1]))
    row = (row << -bits * len(levels) % 8).to_bytes(-(-bits * len(levels) // 8), "big")
    file = png_of(len(levels), bits, 0, row, struct.pack(">H", marked))
    with Image.open(file) as image:
        for _ in range(2):  # the second time it is loaded
            found = np.asarray(as_rgb(image, ground))[0, :, 0]
            assert found.tolist() == [clear if want is None else want for want in expected]


def test_a_transparent_colour_of_16_bits():
    """Its upper halves are told apart: Pillow reads no more of the pixels."""
    row = struct.pack(">9H", *[0x1234] * 3, *[0x3456] * 3, *[0x1212] * 2, 0)
    with Image.open(png_of(3, 16, 2, row, struct.pack(">3H", *[0x1234] * 3))) as image:
        found = np.asarray(as_rgb(image))[0]
    assert found.tolist() == [[255] * 3, [0x34] * 3, [0x12, 0x12, 0]]


def bmp(pixels, side=8):
    """A BMP with a mask for alpha (BITMAPV4HEADER, BI_BITFIELDS), its rows from the bottom up."""
    data = b"".join(bytes([blue, green, red, alpha]) for red, green, blue, alpha in pixels)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, side, side, 1, 32, 3, len(data), 2835, 2835, 0, 0)
    head += masks + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + 108 + len(data), 0, 0, 14 + 108) + head + data


def test_the_unused_fourth_byte_of_a_bmp(tmp_path):
    file = tmp_path / "a.bmp"
    for alpha in (0, 255):
        file.write_bytes(bmp([(9, 8, 7, alpha)] * 64))
        assert level(open_image(file, 8)).tolist() == [9, 8, 7]
    file.write_bytes(bmp([(1, 2, 3, 255)] + [(9, 8, 7, 0)] * 63))  # here it is used
    assert level(open_image(file, 8)).tolist() == [255, 255, 255]


def test_what_is_clear_in_a_mask_is_not_masked():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert not mask_pixels(clear, 8, 8).any()
    clear.paste((255, 255, 255, 255), (0, 0, 4, 8))
    np.testing.assert_array_equal(mask_pixels(clear, 8, 8)[2], [True] * 4 + [False] * 4)
    assert mask_pixels(Image.new("L", (8, 8), 255), 8, 8).all()
    one = Image.new("L", (8, 8), 255)
    one.info["transparency"] = 255
    assert not mask_pixels(one, 8, 8).any()


# ------------------------------------------------------------------------------------------- notes


def png_with(*chunks, colour=(200, 30, 90), size=(8, 8)):
    """A PNG with these chunks before its pixels."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    data = stream.getvalue()
    return data[:33] + b"".join(chunks) + data[33:]


LONG = zlib.compress(bytes(2 * PngImagePlugin.MAX_TEXT_CHUNK))


@pytest.mark.parametrize(
    "note",
    [
        chunk(b"eXIf", b"no EXIF at all"),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff"),
        chunk(b"eXIf", b""),
        chunk(b"zTXt", b"parameters\0\0" + LONG),
        chunk(b"iTXt", b"parameters\0\1\0\0\0" + LONG),
        chunk(b"zTXt", b"parameters\0\0" + b"not compressed"),
        chunk(b"zTXt", b"parameters\0\x07" + LONG),
        chunk(b"tEXt", b"a\0b", crc=1),
        chunk(b"iTXt", b""),
        chunk(b"pHYs", b"\0"),
        chunk(b"prVt", bytes(100_000)),
        chunk(b"iCCP", b"name\0\0" + b"not compressed"),
        chunk(b"iCCP", b"name\0\0" + LONG),
        chunk(b"iCCP", b"name\0\x07" + zlib.compress(profile())),
        chunk(b"iCCP", b"name\0\0" + zlib.compress(profile()), crc=1),
        chunk(b"iCCP", b""),
        chunk(b"gAMA", b"\0\0\xb1\x8f", crc=1),
        chunk(b"cHRM", b"\0"),
        chunk(b"sRGB", b""),
    ],
)
def test_a_good_png_with_bad_notes_is_read(tmp_path, note):
    (tmp_path / "a.png").write_bytes(png_with(note))
    assert level(open_image(tmp_path / "a.png", 8)).tolist() == [200, 30, 90]


def test_a_bad_note_leaves_profile_and_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    good = [
        chunk(b"iCCP", b"name\0\0" + zlib.compress(profile())),
        chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
    ]
    data = png_with(chunk(b"tEXt", b"a\0b", crc=1), *good, size=(8, 12))
    (tmp_path / "a.png").write_bytes(data)
    found = open_image(tmp_path / "a.png", 8)
    assert found.size == (12, 8)
    assert abs(level(found) - in_srgb((200, 30, 90))).max() <= 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("suffix", ["webp", "jpg"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_a_good_image_with_bad_exif_is_read(tmp_path, suffix, exif):
    image = Image.new("RGB", (8, 8), (200, 30, 90))
    found = saved(image, tmp_path / f"a.{suffix}", exif=exif, quality=100)
    assert abs(level(found) - (200, 30, 90)).max() <= 4


@pytest.mark.parametrize(
    "data",
    [
        png_with()[:60],
        png_with().replace(b"IDAT", b"IDAX"),
        png_with(chunk(b"tRNS", b"", crc=1)),
        png_with()[:33] + b"\xff\xff\xff\xff" + png_with()[37:],
        PNG_HEAD := b"\x89PNG\r\n\x1a\n",
        PNG_HEAD + bytes(20),
    ],
)
def test_a_damaged_png_is_refused(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError) as error:
        open_image(tmp_path / "a.png", 8)
    assert str(error.value).startswith(f"{tmp_path / 'a.png'}: ")
