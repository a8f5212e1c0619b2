"""A folder of anybody's images: every kind there is, captions, and what cannot be read."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import Transpose

from tinyldm.data import folder as folder_module
from tinyldm.data.dataset import DataError
from tinyldm.data.folder import FORMATS, load_folder, open_image
from tinyldm.data.images import fitted

SIDE = 8


def load_image(file, side):
    """One image as `load_folder` reads and fits it."""
    return fitted(open_image(Path(file), side), side)


def solid(mode, colour, size=(12, 12)):
    return Image.new(mode, size, colour)


def palette(colour, **info):
    image = Image.new("P", (12, 12), 3)
    image.putpalette([9] * 9 + list(colour))
    image.info.update(info)
    return image


def gray16(level, **options):
    return Image.fromarray(np.full((12, 12), level, np.uint16), **options)


def save(image, file, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return file


def read(folder, side):
    data = load_folder(folder, side)
    return data.images, data.captions, data.names


def one_line(caught, file):
    """The only thing wrong is named in a line of its own, or in the only one."""
    lines = str(caught.value).splitlines()
    assert len(lines) <= 2 and str(file) in lines[-1]
    if len(lines) == 2:
        assert "1 problems with " in lines[0] and "(--skip-bad):" in lines[0]


# -------------------------------------------------------------------------------- kinds of image


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (solid("RGB", (200, 30, 90)), "png", (200, 30, 90)),
        (solid("RGB", (200, 30, 90)), "bmp", (200, 30, 90)),
        (solid("L", 100), "png", (100, 100, 100)),
        (solid("L", 100), "jpeg", (100, 100, 100)),
        (solid("1", 1), "png", (255, 255, 255)),
        (solid("1", 0), "bmp", (0, 0, 0)),
        (palette((200, 30, 90)), "png", (200, 30, 90)),
        (palette((200, 30, 90)), "gif", (200, 30, 90)),
        (gray16(0), "png", (0, 0, 0)),
        (gray16(65535), "png", (255, 255, 255)),
        (gray16(100 * 257), "png", (100, 100, 100)),
        # What is transparent lies on white, in whatever way the file says that it is.
        (solid("LA", (100, 255)), "png", (100, 100, 100)),
        (solid("LA", (100, 51)), "png", (224, 224, 224)),
        (solid("RGBA", (200, 30, 90, 255)), "png", (200, 30, 90)),
        (solid("RGBA", (200, 30, 90, 51)), "png", (244, 210, 222)),
        (solid("RGBA", (200, 30, 90, 0)), "png", (255, 255, 255)),
        (solid("RGBA", (200, 30, 90, 0)), "webp", (255, 255, 255)),
        (palette((200, 30, 90), transparency=3), "png", (255, 255, 255)),
        (palette((200, 30, 90), transparency=2), "png", (200, 30, 90)),
        (palette((200, 30, 90), transparency=bytes([0, 0, 0, 51])), "png", (244, 210, 222)),
        (palette((200, 30, 90), transparency=3), "gif", (255, 255, 255)),
    ],
    ids=lambda x: x.mode if isinstance(x, Image.Image) else str(x),
)  # fmt: skip
def test_every_mode_becomes_the_colours_that_are_seen(tmp_path, image, suffix, expected):
    file = save(image, tmp_path / f"a.{suffix}")
    found = load_image(file, SIDE)
    assert (found.shape, found.dtype) == ((SIDE, SIDE, 3), np.uint8)
    tolerance = 2 if suffix in ("jpeg", "webp") else 1
    assert abs(found.astype(int) - expected).max() <= tolerance
    images, captions, _ = read(tmp_path, SIDE)
    np.testing.assert_array_equal(images, found[None])
    assert captions == [""]


def test_a_transparent_colour_without_an_alpha_channel(tmp_path):
    """One colour of a PNG in RGB or L may be declared transparent."""
    for mode, key, other in (("RGB", (1, 2, 3), (200, 30, 90)), ("L", 7, 100)):
        file = save(solid(mode, key), tmp_path / f"{mode}.png", transparency=key)
        assert (load_image(file, SIDE) == 255).all(), mode
        file = save(solid(mode, other), tmp_path / f"{mode}-other.png", transparency=key)
        assert (load_image(file, SIDE) == np.array(other)).all(), mode


def test_cmyk(tmp_path):
    file = save(solid("CMYK", (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95)
    assert abs(load_image(file, SIDE).astype(int) - (255, 0, 0)).max() <= 3


def test_the_first_frame_of_an_animation(tmp_path):
    red, blue = solid("RGB", (255, 0, 0)), solid("RGB", (0, 0, 255))
    for suffix in ("gif", "webp"):
        file = tmp_path / f"a.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        save(red, file, save_all=True, append_images=[blue], **options)
        assert (load_image(file, SIDE) == (255, 0, 0)).all(), suffix


UPRIGHT = np.zeros((24, 24, 3), np.uint8)  # every quarter in a colour of its own
UPRIGHT[:12, :12], UPRIGHT[:12, 12:] = (250, 0, 0), (0, 250, 0)
UPRIGHT[12:, :12], UPRIGHT[12:, 12:] = (0, 0, 250), (250, 250, 250)


@pytest.mark.parametrize(
    ("orientation", "as_stored"),
    [  # how the camera turned it, which is undone
        (1, None),
        (2, Transpose.FLIP_LEFT_RIGHT),
        (3, Transpose.ROTATE_180),
        (4, Transpose.FLIP_TOP_BOTTOM),
        (5, Transpose.TRANSPOSE),
        (6, Transpose.ROTATE_90),
        (7, Transpose.TRANSVERSE),
        (8, Transpose.ROTATE_270),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_turned_photograph_is_turned_back(tmp_path, orientation, as_stored, suffix):
    image = Image.fromarray(UPRIGHT)
    if as_stored is not None:
        image = image.transpose(as_stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(image, tmp_path / f"a.{suffix}", exif=exif, quality=95)
    found = load_image(file, 24).astype(int)
    corners = np.s_[2::19, 2::19]
    assert abs(found[corners] - UPRIGHT[corners]).max() < 60


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (61, 20), (600, 200)])
def test_the_square_in_the_middle_is_kept(tmp_path, size):
    wide = size[0] > size[1]
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    cut = max(size) // 3
    middle = np.s_[:, cut:-cut] if wide else np.s_[cut:-cut]
    pixels[middle] = (10, 200, 30)
    found = load_image(save(Image.fromarray(pixels), tmp_path / "a.png"), SIDE)
    assert abs(found[2:-2, 2:-2].astype(int) - (10, 200, 30)).max() <= 4  # the filter reaches out


def test_an_image_of_the_right_size_is_left_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = save(Image.fromarray(pixels), tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(file, SIDE), pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2), (7, 9)])
def test_smaller_images_are_enlarged(tmp_path, size):
    file = save(solid("RGB", (200, 30, 90), size), tmp_path / "a.png")
    assert abs(load_image(file, SIDE).astype(int) - (200, 30, 90)).max() <= 1


def test_mixed_sizes_and_modes_in_one_folder(tmp_path):
    originals = [solid("RGB", (200, 30, 90), (40, 30)), solid("L", 7, (5, 9)), gray16(257),
                solid("RGBA", (0, 0, 0, 0), (3, 90)), palette((1, 2, 3))]  # fmt: skip
    for i, original in enumerate(originals):
        save(original, tmp_path / f"{i}.png")
    images, captions, _ = read(tmp_path, 16)
    assert (images.shape, images.dtype) == ((5, 16, 16, 3), np.uint8)
    levels = [(200, 30, 90), (7, 7, 7), (1, 1, 1), (255, 255, 255), (1, 2, 3)]
    np.testing.assert_array_equal(images[:, 8, 8], levels)
    assert captions == [""] * 5


def test_folders_are_searched_for_all_formats_in_any_case(tmp_path):
    for i, suffix in enumerate([*FORMATS, ".PNG", ".JpG"]):
        kind = {"jpg": "JPEG"}.get(suffix[1:].lower(), suffix[1:].upper())
        save(solid("RGB", (i, i, i)), tmp_path / "deep" / "er" / f"{i}{suffix}", format=kind)
    (tmp_path / "notes.md").write_text("no image")
    images, captions, _ = read(tmp_path, SIDE)
    assert len(images) == len(FORMATS) + 2
    assert set(captions) == {"er"}


# ---------------------------------------------------------------------------------------- captions


@pytest.fixture
def shelf(tmp_path):
    """One image for each way to say what it shows, and for none."""
    for name in ("listed.png", "told.png", "both.png", "silent.png", "red_circles/one.png",
                 "red_circles/told.png", "a/b/deep.png"):  # fmt: skip
        save(solid("RGB", (1, 2, 3)), tmp_path / name)
    lines = [
        {"file_name": "listed.png", "text": "from the list"},
        {"file_name": "both.png", "text": "the list goes first", "other": 1},
        {"file_name": "a/b/deep.png", "text": "deep in the list"},
    ]
    text = "\n\n".join(map(json.dumps, lines)) + "\n"
    (tmp_path / "metadata.jsonl").write_text(text)
    (tmp_path / "told.txt").write_text("  from the text file\n")
    (tmp_path / "both.txt").write_text("not this")
    (tmp_path / "red_circles" / "told.txt").write_text("told, not the folder")
    return tmp_path


def captions_of(folder):
    """{name: caption}, in the order of loading."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS)
    names = [p.relative_to(folder).as_posix() for p in files]
    return dict(zip(names, load_folder(folder, SIDE).captions, strict=True))


def test_where_captions_come_from(shelf):
    expected = {
        "a/b/deep.png": "deep in the list",
        "both.png": "the list goes first",
        "listed.png": "from the list",
        "red_circles/one.png": "red circles",
        "red_circles/told.png": "told, not the folder",
        "silent.png": "",
        "told.png": "from the text file",
    }
    assert captions_of(shelf) == expected
    (shelf / "metadata.jsonl").unlink()
    expected |= {"a/b/deep.png": "b", "both.png": "not this", "listed.png": ""}
    assert captions_of(shelf) == expected


CAPTION = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(CAPTION, min_size=1, max_size=3), st.booleans())
@example(["a\u2028b", "c\x85d", "e\x0bf\x1cg"], False)  # which some take for ends of lines
def test_any_text_in_the_list_is_read_as_it_is(tmp_path_factory, captions, ascii_only):
    folder = tmp_path_factory.mktemp("any")
    lines = []
    for i, caption in enumerate(captions):
        save(solid("RGB", (1, 2, 3), (1, 1)), folder / f"{i}.png")
        entry = {"file_name": f"{i}.png", "text": caption}
        lines.append(json.dumps(entry, ensure_ascii=ascii_only))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    assert load_folder(folder, 1).captions == captions


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with the mark that Windows adds"])
def test_text_is_utf8_with_or_without_a_mark(tmp_path, mark):
    for name in ("a", "b"):
        save(solid("RGB", (1, 2, 3)), tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text(mark + "ein größerer Kreis\r\n", "utf-8", newline="")
    line = '{"file_name": "b.png", "text": "円"}\r\n'
    (tmp_path / "metadata.jsonl").write_text(mark + line, "utf-8", newline="")
    assert load_folder(tmp_path, SIDE).captions == ["ein größerer Kreis", "円"]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "1", '"text"', "null", "{}", '{"file_name": "a.png"}', '{"text": "a"}',
     '{"file_name": "a.png", "text": 5}', '{"file_name": "a.png", "text": null}',
     '{"file_name": ["a.png"], "text": "a"}'],
)  # fmt: skip
def test_a_wrong_line_of_the_list_is_named_with_its_number(tmp_path, line):
    save(solid("RGB", (1, 2, 3)), tmp_path / "a.png")
    file = tmp_path / "metadata.jsonl"
    file.write_text('{"file_name": "a.png", "text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2: expected") as caught:
        load_folder(tmp_path, SIDE)
    one_line(caught, file)


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_text_in_another_encoding_is_named(tmp_path, name):
    save(solid("RGB", (1, 2, 3)), tmp_path / "a.png")
    line = '{"file_name": "a.png", "text": "größer"}'
    (tmp_path / name).write_bytes(line.encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8") as caught:
        load_folder(tmp_path, SIDE)
    one_line(caught, tmp_path / name)


# ------------------------------------------------------------------------------------------- order


def test_the_order_is_that_of_the_names_however_they_are_listed(tmp_path, monkeypatch):
    names = ["b/1.png", "a/2.png", "10.png", "9.png", "a/1.jpg", "B.png", "é.png"]
    for i, name in enumerate(names):
        save(solid("RGB", (30 * i, 0, 0)), tmp_path / name)
    images, captions, _ = read(tmp_path, SIDE)
    again, captions_again, _ = read(tmp_path, SIDE)
    np.testing.assert_array_equal(images, again)
    assert captions == captions_again

    paths = sorted(tmp_path.rglob("*"))
    for shuffled in (paths[::-1], paths[3:] + paths[:3]):
        monkeypatch.setattr(type(tmp_path), "rglob", lambda *_, found=shuffled: iter(found))
        np.testing.assert_array_equal(load_folder(tmp_path, SIDE).images, images)


# ----------------------------------------------------------------------------- what cannot be read


def test_no_folder_or_no_image(tmp_path):
    with pytest.raises(DataError, match="expected a folder of images") as caught:
        load_folder(tmp_path / "none", SIDE)
    one_line(caught, tmp_path / "none")
    (tmp_path / "a.txt").write_text("lonely")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path, tmp_path / "empty"):
        with pytest.raises(
            DataError, match=r"no image among its \d files; formats read are \.png"
        ) as caught:
            load_folder(folder, SIDE)
        one_line(caught, folder)
    with pytest.raises(DataError, match="expected a folder") as caught:
        load_folder(tmp_path / "a.txt", SIDE)
    one_line(caught, tmp_path / "a.txt")


def test_a_folder_that_is_called_like_an_image(tmp_path):
    save(solid("RGB", (1, 2, 3)), tmp_path / "scans.png" / "a.png")
    images, captions, _ = read(tmp_path, SIDE)
    assert len(images) == 1 and captions == ["scans.png"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("zero.png", b"", "not an image: empty"),
        ("zero.jpg", b"", "not an image: empty"),
        ("text.png", b"this is no image\n", "not an image in a format that is read"),
        ("page.jpg", b"<!DOCTYPE html><title>404</title>", "not an image in a format"),
        ("start.png", b"\x89PNG\r\n\x1a\n", "an image that is cut off or damaged"),
        ("head.png", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0", "Truncated File Read"),
        ("start.gif", b"GIF89a", "an image that is cut off or damaged"),
        ("start.bmp", b"BM", "not an image in a format"),
        ("start.webp", b"RIFF\x10\x00\x00\x00WEBPVP8 ", "could not create decoder object"),
        ("start.jpg", b"\xff\xd8\xff\xe0", "an image that is cut off or damaged"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, name, content, says):
    save(solid("RGB", (1, 2, 3)), tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="problems with .*; mend or remove them") as caught:
        load_folder(tmp_path, SIDE)
    one_line(caught, tmp_path / name)
    assert says in str(caught.value)


def encoded(suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "JPEG"}.get(suffix, suffix.upper()), exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_an_image_cut_off_anywhere_is_named(tmp_path, suffix):
    """Or, cut off so near to its end that all of it is there, it is read."""
    data, file = encoded(suffix), tmp_path / f"a.{suffix}"
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 150)):
        file.write_bytes(data[:length])
        try:
            load_image(file, SIDE)
        except DataError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, about EXIF it cannot read
def test_an_image_with_a_wrong_byte_is_read_or_named(tmp_path_factory, suffix, place, byte):
    data = bytearray(encoded(suffix))
    data[int(place * len(data))] = byte
    file = tmp_path_factory.getbasetemp() / f"wrong-byte.{suffix}"
    file.write_bytes(data)
    try:
        assert load_image(file, SIDE).shape == (SIDE, SIDE, 3)
    except DataError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    file = save(solid("RGB", (1, 2, 3)), tmp_path / "a.png")
    file.chmod(0)
    with pytest.raises(DataError) as caught:
        load_folder(tmp_path, SIDE)
    one_line(caught, file)


def test_all_that_is_damaged_is_named_at_once_or_left_out(tmp_path):
    for i in range(3):
        save(solid("RGB", (i, i, i)), tmp_path / f"fine-{i}.png")
    names = ["cut.png", "deep/page.jpg", "empty.gif"]
    contents = [encoded("png")[:80], b"<html>", b""]
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "lost.png", "text": "a"}\n[]\n')
    with pytest.raises(DataError, match="6 problems with 7 images .*--skip-bad") as caught:
        load_folder(tmp_path, SIDE)
    lines = str(caught.value).splitlines()[1:]
    named = [
        "metadata.jsonl: line 1",
        "metadata.jsonl: line 2",
        *names[:2],
        "empty.gif",
        "gone.png",
    ]
    assert lines[5:] == ["  and 1 more"]
    data = load_folder(tmp_path, SIDE, skip_bad=True)
    assert data.names == [f"fine-{i}.png" for i in range(3)]
    assert [f"  {line}" for line in data.skipped[:5]] == lines[:5]
    for line, name in zip(data.skipped, named, strict=True):
        assert line.startswith(f"{tmp_path / name}: ")
    for i in range(3):
        (tmp_path / f"fine-{i}.png").unlink()
    with pytest.raises(DataError, match="none of its 4 images can be read") as caught:
        load_folder(tmp_path, SIDE, skip_bad=True)


def test_names_in_the_list_may_be_written_in_any_way(tmp_path):
    save(solid("RGB", (1, 2, 3)), tmp_path / "deep" / "a.png")
    for name in ("./deep/a.png", "deep/../deep/a.png", "deep//a.png"):
        line = json.dumps({"file_name": name, "text": "found"})
        (tmp_path / "metadata.jsonl").write_text(line)
        assert load_folder(tmp_path, SIDE).captions == ["found"], name
    for name in ("../a.png", str(tmp_path / "deep" / "a.png"), "deep"):
        line = json.dumps({"file_name": name, "text": "elsewhere"})
        (tmp_path / "metadata.jsonl").write_text(line)
        with pytest.raises(DataError, match="line 1: there is no image"):
            load_folder(tmp_path, SIDE)


def test_a_wrong_checksum_is_noticed(tmp_path):
    """Every chunk of a PNG has one, which reading alone passes over."""
    data = bytearray(encoded("png"))
    data[-20] ^= 1  # in the checksum of the pixels
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError):
        load_image(tmp_path / "a.png", SIDE)


def test_an_image_that_would_fill_the_memory(tmp_path, monkeypatch):
    file = save(solid("L", 3, (101, 100)), tmp_path / "a.png")
    monkeypatch.setattr(folder_module, "MOST_PIXELS", 10_000)
    with pytest.raises(DataError, match="million pixels, found 101×100"):
        load_image(file, SIDE)
    save(solid("L", 3, (100, 100)), file)
    assert (load_image(file, SIDE) == 3).all()


def test_what_is_said_of_a_folder(shelf):
    (shelf / ".hidden.png").write_bytes(b"")
    (shelf / ".cache").mkdir()
    (shelf / ".cache" / "a.png").write_bytes(b"")
    for name in ("a.tif", "b.tif", "Thumbs.db"):
        (shelf / name).write_bytes(b"")
    data = load_folder(shelf, 16)
    assert data.notes == (
        "captions: 3 from metadata.jsonl, 2 from .txt files, "
        "1 from the name of a sub-folder, 1 images without one",
        "7 of 7 images are enlarged to 16 pixels",
        "files of other kinds, ignored: 2 .tif, 1 .db",
    )
    assert load_folder(shelf, 12).notes[1].startswith("files of other kinds")


def test_texts_of_no_image_are_counted(tmp_path):
    image_file(tmp_path / "a.png")
    for name in ("a.txt", "A.txt", "a.png.txt"):
        (tmp_path / name).write_text("a cat")
    assert load_folder(tmp_path, SIDE).notes[0] == (
        "2 .txt files, such as A.txt, are named like no image"
    )


def test_an_image_has_one_map(tmp_path):
    for name in ("a.png", "a.map.png", "a.map.bmp"):
        image_file(tmp_path / name)
    with pytest.raises(DataError, match=r"a\.png: has 2 maps; keep one"):
        load_folder(tmp_path, SIDE, maps=True)


def test_a_suffix_may_be_wrong(tmp_path):
    save(solid("RGB", (200, 30, 90)), tmp_path / "a.png", format="BMP")
    assert (load_image(tmp_path / "a.png", SIDE) == (200, 30, 90)).all()


def test_a_large_photograph_is_the_same_image(tmp_path):
    """JPEG is decoded at a fraction of its size where that is enough."""
    x = np.linspace(0, 255, 400)
    pixels = np.stack([x + 0 * x[:, None], x[:, None] + 0 * x, 128 + 0 * np.add.outer(x, x)], 2)
    image = Image.fromarray(pixels.astype(np.uint8))
    plain = load_image(save(image, tmp_path / "a.png"), 16).astype(int)
    photograph = load_image(save(image, tmp_path / "a.jpg", quality=95), 16)
    assert abs(photograph - plain).max() <= 4


# ---------------------------------------------------------------------- what the user sees in it


def named(folder):
    """{name: caption} as it was read, and the remarks."""
    data = load_folder(folder, SIDE)
    return dict(zip(data.names, data.captions, strict=True)), data.notes


def image_file(file):
    return save(solid("RGB", (1, 2, 3)), file)


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    shelf, outside = tmp_path / "shelf", tmp_path / "outside"
    image_file(shelf / "a.png")
    image_file(outside / "cats" / "b.png")
    (shelf / "others").symlink_to(outside)
    (shelf / "same.png").symlink_to(shelf / "a.png")
    (outside / "back").symlink_to(shelf)
    (outside / "cats" / "round").symlink_to(outside / "cats")
    (shelf / "self").symlink_to(shelf)
    found, notes = named(shelf)
    assert found == {"a.png": "", "same.png": "", "others/cats/b.png": "cats"}
    assert notes[0] == "1 files are reached by links that lead out of the folder"


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    image_file(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"gone\.png: No such file"):
        load_folder(tmp_path, SIDE)


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_text_that_is_a_folder_or_a_dangling_link_is_named(tmp_path, name):
    image_file(tmp_path / "a.png")
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: expected a file of text, found something else"):
        load_folder(tmp_path, SIDE)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=rf"{name}: No such file"):
        load_folder(tmp_path, SIDE)


@pytest.mark.parametrize("name", ["a.png", "a.txt", "metadata.jsonl", "metadata.csv"])
def test_a_pipe_does_not_hang(tmp_path, name):
    image_file(tmp_path / ("b.png" if name == "a.png" else "a.png"))
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: expected a file"):
        load_folder(tmp_path, SIDE)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "{}"),
        ("metadata.csv", "file_name,text\na.png,{}\n"),
        ("metadata.jsonl", '{{"file_name": "a.png", "text": "{}"}}'),
    ],
)
def test_a_caption_is_short(tmp_path, name, content):
    image_file(tmp_path / "a.png")
    (tmp_path / name).write_text(content.format("é" * 2**15), "utf-8")
    assert named(tmp_path)[0]["a.png"] == "é" * 2**15
    (tmp_path / name).write_text(content.format("x" + "é" * 2**15), "utf-8")
    with pytest.raises(
        DataError, match=r"expected a caption of at most 65,536 bytes, found 65,537"
    ):
        load_folder(tmp_path, SIDE)


def test_a_sub_folder_whose_name_is_no_text_is_a_caption(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff_c")
    os.mkdir(folder)
    Image.new("RGB", (8, 8)).save(os.path.join(folder, "a.png"))
    (caption,) = load_folder(tmp_path, 8).captions
    assert caption == "b\ufffd c" and caption.encode()


def test_metadata_in_sub_folders_and_as_a_table(tmp_path):
    for name in ("train/a.png", "train/b.png", "train/deep/c.png", "test/d.png", "e.png", "f.png"):
        image_file(tmp_path / name)
    lines = [{"file_name": "a.png", "text": "A"}, {"file_name": "deep/c.png", "text": "C"}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = 'file_name,text,other\nd.png,"two, words",1\n'
    (tmp_path / "test" / "metadata.csv").write_text("\ufeff" + table)
    above = 'text,file_name\r\nE,e.png\r\n"B\r\nof two lines",./train/b.png\r\nno,train/a.png\r\n'
    (tmp_path / "metadata.csv").write_bytes(above.encode())
    found, notes = named(tmp_path)
    assert found == {
        "e.png": "E", "f.png": "", "test/d.png": "two, words", "train/a.png": "A",
        "train/b.png": "B\nof two lines", "train/deep/c.png": "C",
    }  # fmt: skip
    assert "2 from metadata.jsonl" in notes[0] and "3 from metadata.csv" in notes[0]


ENTRY = '{"file_name": "a.png", "text": "A"}'


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("metadata.csv", "file_name,caption\na.png,A\n", "line 1: expected columns file_name and"),
        ("metadata.csv", "a.png,A\n", "line 1: expected columns file_name and text, once each"),
        ("metadata.csv", "file_name;text\na.png;A\n", "line 1: expected columns"),
        ("metadata.csv", "text,file_name,text\nA,a.png,B\n", "line 1: expected columns"),
        ("metadata.csv", "file_name,text\nb.png,A\n", "line 2: there is no image 'b.png'"),
        ("metadata.csv", "file_name,text\n../a.png,A\n", "line 2: there is no image '../a.png'"),
        ("metadata.csv", "file_name,text\n\na.png\n", "line 3: expected 2 columns, found 1"),
        ("metadata.csv", "file_name,text\na.png,a cat, on a mat\n",
         "line 2: expected 2 columns, found 3: 'a.png,a cat, on a mat'; quote commas"),
        ("metadata.csv", "file_name,text,other\na.png,A\n", "line 2: expected 3 columns, found 2"),
        ("metadata.csv", 'file_name,text\na.png,"a cat\na.png,a dog\n',
         "line 2: expected CSV, found one that breaks off (unexpected end of data)"),
        ("metadata.csv", 'file_name,text\na.png,"a cat\na.png,"a dog"\n', "line 2: expected CSV"),
        ("metadata.csv", "file_name,text\na.png,A\na.png,B\n", "line 3: a second text for 'a.png'"),
        ("metadata.jsonl", f"{ENTRY}\n{ENTRY.replace('A', 'B')}", "line 2: a second text"),
        ("metadata.jsonl", ENTRY.replace("}", ', "text": "B"}'), "(the key 'text' occurs twice)"),
        ("metadata.jsonl", "[" * 100_000, "line 1: expected"),
        ("metadata.jsonl", '{"file_name": "/etc/passwd", "text": "A"}', "line 1: there is no"),
        ("metadata.jsonl", '{"file_name": "sub/../../a.png", "text": "A"}', "line 1: there is no"),
        ("metadata.jsonl", '["a.png", "A"]', "line 1: expected"),
        ("metadata.jsonl", '{"file_name": ["a.png"], "text": "A"}', "line 1: expected"),
    ],
)  # fmt: skip
def test_a_bad_line_of_metadata_is_named(tmp_path, name, content, says):
    folder = tmp_path / "shelf"
    image_file(folder / "a.png")
    image_file(tmp_path / "a.png")
    (folder / name).write_text(content)
    with pytest.raises(DataError) as caught:
        load_folder(folder, SIDE)
    one_line(caught, folder / name)
    problem = str(caught.value).splitlines()[-1]
    assert says in problem and len(problem) < 500


def test_an_image_has_one_text_however_often_it_is_told(tmp_path):
    """Nearer files count; those of one folder must agree."""
    image_file(tmp_path / "deep" / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "deep/a.png", "text": "far"}')
    (tmp_path / "deep" / "metadata.jsonl").write_text(f"{ENTRY}\n{ENTRY}\n")
    table = tmp_path / "deep" / "metadata.csv"
    table.write_text("file_name,text\n\na.png,A\n")
    assert named(tmp_path)[0] == {"deep/a.png": "A"}
    table.write_text("file_name,text\na.png,B\n")
    with pytest.raises(DataError, match="jsonl: line 1: a second text for 'deep/a.png'; keep one"):
        load_folder(tmp_path, SIDE)
    table.write_text("")  # no line
    assert named(tmp_path)[0] == {"deep/a.png": "A"}


COMPOSED, DECOMPOSED = "caf\u00e9.png", "cafe\u0301.png"


@pytest.mark.parametrize("on_disk, listed", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_are_found_in_either_normal_form(tmp_path, on_disk, listed):
    image_file(tmp_path / on_disk)
    line = json.dumps({"file_name": listed, "text": "a café"})
    (tmp_path / "metadata.jsonl").write_text(line)
    assert named(tmp_path)[0] == {on_disk: "a café"}
    image_file(tmp_path / listed)  # now both are there, and each is itself
    assert named(tmp_path)[0] == {listed: "a café", on_disk: ""}


@pytest.mark.parametrize("image, other", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_texts_and_maps_are_found_in_either_normal_form(tmp_path, image, other):
    image_file(tmp_path / image)
    (tmp_path / other).with_suffix(".txt").write_text("a café")
    layout = solid("RGB", (9, 9, 9))
    save(layout, (tmp_path / other).with_suffix(".map.png"))
    data = load_folder(tmp_path, SIDE, maps=True)
    assert data.captions == ["a café"] and (data.maps == 9).all()
    (tmp_path / image).with_suffix(".txt").write_text("its own")
    assert load_folder(tmp_path, SIDE, maps=True).captions == ["its own"]


@pytest.mark.parametrize(
    "name, as_shown",
    [
        (b"caf\xe9", r"caf\udce9"),  # Latin-1
        (b"a\nb", r"a\nb"),
        (b"\x1b[31mred", r"\x1b[31mred"),
        (b"\x07", r"\x07"),
        ("\u202eevil".encode(), r"\u202eevil"),
        (b"\xff\xfe", r"\udcff\udcfe"),
        (b"tab\there", r"tab\there"),
        (b"c1\xc2\x9b31m", r"c1\x9b31m"),
        ("\u2028".encode(), r"\u2028"),
        ("\ufeffbom".encode(), r"\ufeffbom"),
    ],
)
def test_names_that_cannot_be_shown_are_escaped(tmp_path, name, as_shown):
    folder = tmp_path / os.fsdecode(name)
    image_file(folder / os.fsdecode(name + b".png"))
    found, _ = named(folder)
    assert list(found) == [f"{as_shown}.png"]
    (folder / os.fsdecode(name + b"2.png")).write_bytes(b"no image")
    with pytest.raises(DataError) as error:
        load_folder(folder, SIDE)
    problem = str(error.value).splitlines()[-1]
    assert f"{as_shown}2.png: not an image" in problem and problem.lstrip().isprintable()
