"""Data sets in a few large files: written by others' code here, read by ours."""

import gzip
import os
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.data.dataset import DataError
from tinyldm.data.formats import find_arrays, load_arrays, read_idx
from tinyldm.training.preparation import load_data
from tinyldm.training.presets import make_config

NAMES = ["airplane", "automobile", "bird"]


def idx(array):
    """The format's own words: 0 0, type, dimensions, sizes, then the numbers."""
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return head + b"".join(struct.pack(">I", side) for side in array.shape) + array.tobytes()


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def mnist(tmp_path):
    """A folder as Yann LeCun's: images and labels, for training and for testing."""
    images, labels = random_images(7, 28, 28), np.uint8([3, 1, 0, 9, 9, 2, 5])
    for part, n in (("train", 7), ("t10k", 2)):
        for kind, array in (("images-idx3", images[:n]), ("labels-idx1", labels[:n])):
            file = tmp_path / f"{part}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(idx(array)))
    return tmp_path, images, labels


def cifar_record(label, image):
    return bytes([label]) + b"".join(image[:, :, channel].tobytes() for channel in range(3))


@pytest.fixture
def cifar(tmp_path):
    images, labels = random_images(5, 32, 32, 3), [0, 2, 1, 2, 0]
    records = [cifar_record(*pair) for pair in zip(labels, images, strict=True)]
    (tmp_path / "data_batch_1.bin").write_bytes(b"".join(records[:3]))
    (tmp_path / "data_batch_2.bin").write_bytes(b"".join(records[3:]))
    (tmp_path / "test_batch.bin").write_bytes(records[0])
    return tmp_path, images, labels


# ------------------------------------------------------------------------------------- round trips


@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=3), zipped=st.booleans())
def test_idx(tmp_path_factory, shape, zipped):
    array = random_images(*shape)
    file = tmp_path_factory.mktemp("idx") / "array"
    file.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    np.testing.assert_array_equal(read_idx(file, len(shape)), array)


def test_mnist(mnist):
    folder, images, labels = mnist
    files = find_arrays(folder)
    assert [file.name for file in files] == ["train-images-idx3-ubyte.gz"]
    data = load_arrays(files, 28)
    np.testing.assert_array_equal(data.images, images[..., None].repeat(3, axis=3))
    assert data.captions == [str(label) for label in labels]
    (folder / "labels.txt").write_text("\n".join(f"a digit {i}" for i in range(10)))
    assert load_arrays(files, 32).captions[0] == "a digit 3"
    assert load_arrays(files, 32).images.shape == (7, 32, 32, 3)
    assert any("enlarged to 32" in remark for remark in load_arrays(files, 32).notes)


@pytest.mark.parametrize("unpacked", ["train-images-idx3-ubyte", "train-images.idx3-ubyte"])
def test_an_array_that_is_there_twice_is_read_once(mnist, unpacked):
    """Read the unpacked file of a pair, as torchvision leaves in MNIST/raw; of labels, too."""
    folder, images, labels = mnist
    (folder / unpacked).write_bytes(idx(images[::-1]))
    (folder / unpacked.replace("images", "labels").replace("3", "1")).write_bytes(idx(labels[::-1]))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(images[:2]))
    files = find_arrays(folder)
    assert [file.name for file in files] == [unpacked]
    data = load_arrays(files, 28)
    np.testing.assert_array_equal(data.images[..., 0], images[::-1])
    assert data.captions == [str(label) for label in labels[::-1]]
    assert data.notes[1] == (
        "not read: t10k-images-idx3-ubyte, t10k-images-idx3-ubyte.gz, "
        "train-images-idx3-ubyte.gz; name one to read it alone"
    )
    (folder / unpacked).unlink()
    packed = folder / "t10k-images-idx3-ubyte.gz"
    assert find_arrays(packed) == [packed]
    packed.with_suffix("").unlink()
    (folder / "train-images-idx3-ubyte.gz").unlink()
    assert find_arrays(folder) == [packed]


def test_mnist_unpacked_and_without_labels(mnist):
    folder, images, labels = mnist
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(idx(images))
    assert load_arrays([file], 28).captions == [str(label) for label in labels]
    for labels_file in folder.glob("*labels*"):
        labels_file.unlink()
    data = load_arrays([file], 28)
    assert data.captions == [""] * 7 and len(data) == 7


def test_cifar(cifar):
    folder, images, labels = cifar
    files = find_arrays(folder)
    assert [file.name for file in files] == ["data_batch_1.bin", "data_batch_2.bin"]
    data = load_arrays(files, 32)
    np.testing.assert_array_equal(data.images, images)
    assert data.captions == [str(label) for label in labels]
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    assert load_arrays(files, 16).captions == [NAMES[label] for label in labels]
    assert load_arrays(files, 16).images.shape == (5, 16, 16, 3)
    assert find_arrays(folder / "test_batch.bin") == [folder / "test_batch.bin"]


@pytest.mark.parametrize("shape", [(4, 20, 20), (4, 20, 20, 1), (4, 20, 20, 3)])
@pytest.mark.parametrize(
    "more, captions",
    [
        ({}, [""] * 4),
        ({"labels": np.array([[2], [0], [1], [1]])}, ["2", "0", "1", "1"]),
        ({"captions": np.array(["a", "b c", "dé", ""])}, ["a", "b c", "dé", ""]),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, shape, more, captions, save):
    images = random_images(*shape)
    save(tmp_path / "data.npz", images=images, **more)
    data = load_arrays(find_arrays(tmp_path), 20)
    rgb = images if shape[3:] == (3,) else images.reshape(4, 20, 20, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(data.images, rgb)
    assert data.captions == captions


def test_images_that_are_not_square_are_cropped_in_their_middle(tmp_path):
    images = np.zeros((1, 10, 30), np.uint8)
    images[:, :, 10:20] = 200
    np.savez(tmp_path / "data.npz", images=images)
    assert (load_arrays([tmp_path / "data.npz"], 10).images == 200).all()


# ---------------------------------------------------------------------------------------- mistakes


def assert_refused(file, *parts):
    with pytest.raises(DataError) as caught:
        load_arrays([file], 28)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in (file.name, *parts)), text


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda raw: raw[:-1], "expected 5,488 bytes for (7, 28, 28), found 5,487"),
        (lambda raw: raw + b"!", "found more"),
        (lambda raw: raw[:6], "its header is damaged"),
        (lambda raw: b"", "expected an IDX file of bytes in 3 dimensions"),
        (lambda raw: b"\x00\x00\x0d" + raw[3:], "begins with 0 0 8 3, found 0 0 13 3"),
        (lambda raw: raw[:4] + b"\xff\xff\xff\xff" + raw[8:], "its header is damaged"),
        (lambda raw: raw[:4] + b"\x7f\xff\xff\xff" + raw[8:], "its header is damaged"),
        (lambda raw: gzip.compress(raw)[:-9], "damaged or cut off"),
        (lambda raw: gzip.compress(raw)[:20] + b"broken" * 30, "damaged"),
    ],
)
def test_a_damaged_idx_file(mnist, change, says):
    folder, images, _ = mnist
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(change(idx(images)))
    assert_refused(file, says)


def test_labels_of_another_number(mnist):
    folder, images, labels = mnist
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[:5])))
    with pytest.raises(DataError, match="5 labels for the 7 images"):
        load_arrays(find_arrays(folder), 28)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (folder / "labels.txt").write_text("only\nthree\nnames")
    with pytest.raises(DataError, match="labels.txt: 3 names, but there is a class 9"):
        load_arrays(find_arrays(folder), 28)


def test_a_damaged_cifar_file(cifar):
    folder, _, _ = cifar
    file = folder / "data_batch_1.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(file, "records of 3073 bytes", "found 9,218 bytes")
    file.write_bytes(b"")
    assert_refused(file, "found 0 bytes")


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"photos": random_images(2, 8, 8)}, "expected an array `images`, found photos"),
        ({"images": np.zeros((2, 8, 8))}, "found float64 (2, 8, 8)"),
        ({"images": random_images(2, 8)}, "found uint8 (2, 8)"),
        ({"images": random_images(2, 8, 8, 4)}, "found uint8 (2, 8, 8, 4)"),
        ({"images": random_images(2, 8, 8), "captions": np.array(["a"])}, "1 captions for 2"),
        ({"images": random_images(2, 8, 8), "labels": np.ones(2)}, "integers (2,), found float64"),
        ({"images": np.array([{}], object)}, "not an .npz of plain arrays"),
        ({"images": random_images(0, 8, 8)}, "hold no image"),
    ],
)  # fmt: skip
def test_an_npz_of_something_else(tmp_path, arrays, says):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError) as caught:
        load_arrays([tmp_path / "data.npz"], 28)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda data: b"", "not an .npz of plain arrays (it is no zip archive)"),
        (lambda data: b"rubbish" * 99, "not an .npz of plain arrays (it is no zip archive)"),
        (lambda data: b"rubbish" + data, "not an .npz of plain arrays (it is no zip archive)"),
        (lambda data: data[:10], "not an .npz of plain arrays (File is not a zip file)"),
        (lambda data: data[:-30], "not an .npz of plain arrays"),
        (lambda data: b"PK\5\6" + bytes(18), "expected an array `images`, found no array"),
    ],
)
def test_a_damaged_npz(tmp_path, change, says):
    file = tmp_path / "data.npz"
    np.savez(file, images=random_images(2, 8, 8))
    file.write_bytes(change(file.read_bytes()))
    assert_refused(file, says)


def test_rubbish_in_an_npz(tmp_path):
    """NumPy returns bytes for what does not begin as an array."""
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("images.npy", b"rubbish")
    assert_refused(tmp_path / "data.npz", "expected `images` of uint8", "found |S7 ()")


@pytest.mark.parametrize(
    "more, captions, unread",
    [
        ({"label": [1, 0]}, ["", ""], "label"),
        ({"text": ["a", "b"], "ids": [1, 2]}, ["", ""], "text, ids"),
        ({"captions": ["a", "b"], "labels": [1, 0]}, ["a", "b"], "labels"),
        ({"labels": [1, 0], "text": ["a", "b"]}, ["1", "0"], "text"),
        ({"labels": [1, 0]}, ["1", "0"], None),
        ({}, ["", ""], None),
    ],
)
def test_an_array_that_is_not_read_is_named(tmp_path, more, captions, unread):
    arrays = {name: np.array(values) for name, values in more.items()}
    np.savez(tmp_path / "data.npz", images=random_images(2, 8, 8), **arrays)
    data = load_arrays([tmp_path / "data.npz"], 8)
    assert data.captions == captions
    note = f"data.npz: not read: {unread}; captions are `captions`, else `labels`"
    assert data.notes[1:] == ((note,) if unread else ())


def test_a_pickle_in_an_npz_is_not_opened(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    np.savez(tmp_path / "data.npz", images=np.array([Bomb()], object))
    assert_refused(tmp_path / "data.npz", "not an .npz of plain arrays (it holds Python objects)")
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------ where files lie


@pytest.mark.parametrize("below", ["MNIST/raw", "FashionMNIST/raw", "raw", "a/b/c"])
def test_files_in_a_folder_below_are_found(mnist, tmp_path_factory, below):
    folder, images, labels = mnist
    root = tmp_path_factory.mktemp("root")
    folder.rename(root / "x")
    (root / below).parent.mkdir(parents=True, exist_ok=True)
    (root / "x").rename(root / below)
    (root / below / ".hidden.png").write_bytes(b"")
    config = make_config("tiny", data=str(root))
    assert load_data(config).captions == [str(label) for label in labels]


def test_data_sets_in_two_folders_are_refused(mnist):
    folder, *_ = mnist
    (folder / "more").mkdir()
    np.savez(folder / "more" / "data.npz", images=random_images(2, 8, 8))
    with pytest.raises(DataError, match="data sets in several folders"):
        find_arrays(folder)


def test_a_folder_or_a_pipe_of_such_a_name(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    assert find_arrays(tmp_path) == []
    os.mkfifo(tmp_path / "data.npz")
    with pytest.raises(DataError, match=r"data\.npz: expected a file, found a device or a pipe"):
        load_arrays(find_arrays(tmp_path), 28)


def test_arrays_that_are_not_used_are_not_read(tmp_path, monkeypatch):
    images = np.zeros((2, 8, 8), np.uint8)
    others = {f"a{i}": np.zeros(3) for i in range(9)}
    np.savez(tmp_path / "a.npz", images=images, **others)
    read, load = [], np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile,
        "__getitem__",
        lambda self, key: (read.append(key), load(self, key))[1],
    )
    data = load_arrays([tmp_path / "a.npz"], 8)
    assert read == ["images"] and len(data) == 2
    assert "not read: a0, a1, a2, a3, a4 and 4 more" in data.notes[-1]


def test_another_data_set_beside_is_named(mnist):
    folder, images, _ = mnist
    np.savez(folder / "data.npz", images=random_images(2, 8, 8))
    (folder / "._data.npz").write_bytes(b"")
    data = load_arrays(find_arrays(folder), 28)
    np.testing.assert_array_equal(data.images[..., 0], images)
    assert data.notes[1] == (
        "not read: data.npz, t10k-images-idx3-ubyte.gz; name one to read it alone"
    )
    for i in range(4):
        (folder / f"data-{i}.npz").touch()
    note = load_arrays(find_arrays(folder), 28).notes[1]
    assert note.startswith("not read: data-0.npz, ") and "data.npz and 1 more; name one" in note


def test_names_that_cannot_be_shown_are_escaped(tmp_path):
    folder = tmp_path / "\x1b[31m"
    folder.mkdir()
    (folder / "a\nb.npz").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"\\x1b\[31m/a\\nb\.npz: not an \.npz") as caught:
        load_arrays(find_arrays(folder), 8)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["labels.txt", "train-labels-idx1-ubyte", "batches.meta.txt"])
@pytest.mark.parametrize(
    "make, says",
    [
        (os.mkfifo, "expected (a file of text|an IDX file), found"),
        (os.mkdir, "expected (a file of text|an IDX file), found"),
        (lambda file: file.symlink_to("/dev/zero"), "expected (a file of text|an IDX file), found"),
        (lambda file: file.symlink_to("nothing"), "No such file or directory"),
    ],
)
def test_labels_that_never_end_or_are_not_there(tmp_path, name, make, says):
    if name == "batches.meta.txt":
        data = tmp_path / "data_batch_1.bin"
        data.write_bytes(cifar_record(0, random_images(32, 32, 3)))
    else:
        data = tmp_path / "train-images-idx3-ubyte"
        data.write_bytes(idx(random_images(1, 8, 8)))
    if name == "labels.txt":
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.uint8([0])))
    make(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: {says}"):
        load_arrays([data], 8)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "data_batch_1.bin", "data.npz"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, name):
    (tmp_path / name).symlink_to("nothing")
    with pytest.raises(DataError, match=f"{name}: No such file or directory"):
        load_arrays(find_arrays(tmp_path), 8)


# ------------------------------------------------------------------------- a table never shifts


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\ufeffzero\none\ntwo", ["zero", "two"]),
        ("zero  \n one\t\ntwo \n", ["zero", "two"]),
        ("zero\r\none\r\ntwo\r\n\r\n\n", ["zero", "two"]),
        ("zero\n\none\ntwo", "labels.txt: line 2 is empty"),
        ("\nzero\none\ntwo", "labels.txt: line 1 is empty"),
        ("zero\none\n   \n\ntwo", "labels.txt: line 3 is empty"),
        ("zero\none", "labels.txt: 2 names, but there is a class 2"),
        ("", "labels.txt: line 1 is empty"),
        *((f"zero{char}0\r\none\ntwo", [f"zero{char}0", "two"]) for char in "\u2028\x85\f\v\x1c"),
        (b"z\xe9ro\none\ntwo", "labels.txt: expected text in UTF-8"),
    ],
)
def test_names_of_classes(tmp_path, text, expected):
    np.savez(tmp_path / "data.npz", images=random_images(2, 8, 8), labels=np.array([0, 2]))
    (tmp_path / "labels.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, list):
        assert load_arrays(find_arrays(tmp_path), 8).captions == expected
    else:
        with pytest.raises(DataError, match=expected):
            load_arrays(find_arrays(tmp_path), 8)


@pytest.mark.parametrize(
    "column, expected",
    [
        ({"labels": [0, -1]}, "data.npz: expected class numbers of 0 or more, found -1"),
        ({"labels": [-100, 0]}, "data.npz: expected class numbers of 0 or more, found -100"),
        ({"labels": [[1, 0], [0, 1]]}, "expected `labels` of integers (2,), found int64 (2, 2)"),
        ({"labels": [[3], [4]]}, ["3", "4"]),
        ({"labels": [3, 4, 5]}, "expected `labels` of integers (2,), found int64 (3,)"),
        ({"labels": [True, False]}, "expected `labels` of integers (2,), found bool (2,)"),
        ({"labels": 3}, "expected `labels` of integers (2,), found int64 ()"),
        ({"captions": [b"a cat", "d\u00e9j\u00e0".encode()]}, ["a cat", "d\u00e9j\u00e0"]),
        ({"captions": [b"a cat", b"d\xe9j\xe0"]}, "expected captions in UTF-8"),
        ({"captions": ["a cat", "two\nlines"]}, ["a cat", "two\nlines"]),
        ({"captions": [["a", "b"], ["c", "d"]]}, "expected `captions` of text (n,), found <U1"),
        ({"captions": [1, 2]}, "expected `captions` of text (n,), found int64 (2,)"),
        ({"captions": ["", "é" * 2**15]}, ["", "é" * 2**15]),
        ({"captions": ["", "é" * 2**15 + "x"]}, "a caption of at most 65,536 bytes, found 65,537"),
        ({"captions": "one for all"}, "expected `captions` of text (n,), found <U11 ()"),
    ],
)
def test_captions_and_labels_of_an_npz(tmp_path, column, expected):
    arrays = {name: np.array(values) for name, values in column.items()}
    np.savez(tmp_path / "data.npz", images=random_images(2, 8, 8), **arrays)
    if isinstance(expected, list):
        assert load_arrays([tmp_path / "data.npz"], 8).captions == expected
    else:
        assert_refused(tmp_path / "data.npz", expected)


@pytest.mark.parametrize(
    "images",
    [
        np.ones((2, 8, 8), bool),
        np.zeros((8, 8, 3), np.uint8),  # one image, not eight of 8×3
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((2, 0, 8), np.uint8),
        np.zeros((2, 8, 0, 3), np.uint8),
        np.zeros((1, 1, 10**8), np.uint8),
        np.zeros((), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((2, 8, 8, 3, 1), np.uint8),
    ],
)
def test_images_of_another_rank(tmp_path, images):
    np.savez_compressed(tmp_path / "data.npz", images=images)
    assert_refused(tmp_path / "data.npz", "images")


def test_an_npz_of_an_unknown_compression(tmp_path):
    np.savez(tmp_path / "data.npz", images=random_images(2, 8, 8))
    data = bytearray((tmp_path / "data.npz").read_bytes())
    entry = data.index(b"PK\x01\x02")  # of the list of contents: its method
    data[entry + 10 : entry + 12] = b"\x63\x00"
    (tmp_path / "data.npz").write_bytes(data)
    assert_refused(tmp_path / "data.npz", "not an .npz of plain arrays")
