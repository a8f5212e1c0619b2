"""Images with captions: what is kept away from training, and whether they are still the same."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.data.dataset import FEWEST_TO_SPLIT, MOST_HELD_OUT, Dataset


def some(n, side=2):
    images = np.arange(n * side * side * 3, dtype=np.uint64).reshape(n, side, side, 3)
    names = [str(i) for i in range(n)]
    return Dataset((images % 251).astype(np.uint8), [f"image {i}" for i in names], names)


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 5))
def test_every_image_is_on_one_side_with_its_caption(n, share, seed):
    data = some(n)
    training, held_out = data.split(share, seed)
    assert sorted([*training.names, *held_out.names], key=int) == data.names
    count = 0 if n < FEWEST_TO_SPLIT else min(MOST_HELD_OUT, round(n * share))
    assert len(held_out) == count
    for part in (training, held_out):
        assert part.names == sorted(part.names, key=int)
        for image, caption, name in zip(part.images, part.captions, part.names, strict=True):
            assert caption == f"image {name}"
            np.testing.assert_array_equal(image, data.images[int(name)])


def test_the_split_depends_on_the_seed_alone():
    data = some(100)
    assert data.split(0.1, 0)[1].names == data.split(0.1, 0)[1].names
    assert data.split(0.1, 0)[1].names != data.split(0.1, 1)[1].names


def test_at_most_so_many_are_held_out():
    assert len(some(5 * MOST_HELD_OUT, side=1).split(0.5, 0)[1]) == MOST_HELD_OUT


def test_the_fingerprint_sees_every_pixel_and_every_caption():
    data = some(3)
    assert data.fingerprint() == some(3).fingerprint()
    other = some(3)
    other.images[2, 1, 1, 2] ^= 1
    assert other.fingerprint() != data.fingerprint()
    for captions in (
        ["image 0", "image 1", "image 3"],
        ["image 1", "image 0", "image 2"],
        ["image 0image 1", "", "image 2"],
    ):
        assert Dataset(data.images, captions, data.names).fingerprint() != data.fingerprint()
    assert data.pick([0, 1]).fingerprint() != data.fingerprint()
    flat = Dataset(data.images.reshape(3, 1, 4, 3), data.captions, data.names)
    assert flat.fingerprint() != data.fingerprint()
    odd = Dataset(data.images, ["\udcff", "", ""], data.names)  # a name that is not UTF-8
    assert len(odd.fingerprint()) == 16


def test_mirror_images():
    images = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    data = Dataset(images, ["a", "b"], ["x", "y"], ("a remark",), ("a file",))
    both = data.with_mirror_images()
    np.testing.assert_array_equal(both.images[:2], images)
    np.testing.assert_array_equal(both.images[2:], images[:, :, ::-1])
    assert both.captions == ["a", "b", "a", "b"]
    assert both.names == ["x", "y", "x, mirrored", "y, mirrored"]
    assert (both.notes, both.skipped) == (("a remark",), ("a file",))
