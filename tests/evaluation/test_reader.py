"""The reader of attributes: right on true images, strict on wrong ones, silent on none."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import gaussian_filter
from slow import mostly_slow

from tinyldm.data.shapes import ATTRIBUTES, COLOURS, Attributes, combinations, draw, make_shapes
from tinyldm.evaluation.reader import AREA, DROP, read_attributes, score, shape_coverage

EVERY = combinations(held_out=False) + combinations(held_out=True)


@pytest.mark.parametrize(
    "n, side, held_out",
    mostly_slow(
        [(1500, 32, False), (500, 32, True), (500, 16, False), (300, 64, False)], (500, 32, True)
    ),
)
def test_true_images_are_read_right(n, side, held_out):
    assert score(*make_shapes(n, side, seed=11, held_out=held_out))["all"] >= 0.995


@pytest.mark.slow
def test_every_combination_is_read_right():
    wrong = [
        attributes.caption
        for i, attributes in enumerate(EVERY)
        if read_attributes(draw(attributes, np.random.default_rng(i))) != attributes
    ]
    assert not wrong


def test_blur_and_noise_are_forgiven():
    images, captions = make_shapes(600, seed=12)
    soft = gaussian_filter(images.astype(float), (0, 0.7, 0.7, 0))
    noisy = soft + np.random.default_rng(0).normal(0, 8, images.shape)
    generated = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    assert score(generated, captions)["all"] >= 0.98


def test_swapped_colours_are_read_as_they_are():
    # The mirror image c -> shape + ground - c in colour space exchanges the two exactly.
    images, captions = make_shapes(300, seed=13)
    for image, attributes in zip(images, map(Attributes.parse, captions), strict=True):
        colour, background = COLOURS[attributes.colour], COLOURS[attributes.background]
        mirrored = np.clip(np.add(colour, background) - image.astype(int), 0, 255)
        swapped = replace(attributes, colour=attributes.background, background=attributes.colour)
        assert read_attributes(mirrored.astype(np.uint8)) == swapped


@given(st.sampled_from(EVERY), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_a_mirrored_image_is_read_mirrored(attributes, seed):
    image = draw(attributes, np.random.default_rng(seed))
    other_side = {"left": "right", "right": "left"}
    position = other_side.get(attributes.position, attributes.position)
    assert read_attributes(image[:, ::-1]) == replace(attributes, position=position)


@given(st.sampled_from(EVERY), st.sampled_from(EVERY))
@settings(deadline=None)
def test_score_counts_exactly_what_is_wrong(shown, said):
    fractions = score(draw(shown, np.random.default_rng(0))[None], [said.caption])
    for name in ATTRIBUTES:
        assert fractions[name] == (getattr(shown, name) == getattr(said, name))
    assert fractions["all"] == (shown == said)


def test_score_is_a_fraction_per_attribute():
    images, captions = make_shapes(4, seed=14)
    first = Attributes.parse(captions[0])
    other = "small" if first.size == "large" else "large"
    captions[0] = replace(first, size=other).caption
    expected = dict.fromkeys([*ATTRIBUTES, "all"], 1.0) | {"size": 0.75, "all": 0.75}
    assert score(images, captions) == expected


@given(
    st.sampled_from([1, 16, 23, 32]).flatmap(lambda side: arrays(np.uint8, (side, side, 3))),
)
@settings(deadline=None)
def test_any_image_gets_an_answer(image):
    before = image.copy()
    assert isinstance(read_attributes(image), Attributes)
    assert np.array_equal(image, before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_image_gets_an_answer(level):
    assert read_attributes(np.full((32, 32, 3), level, np.uint8)).position == "center"


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.float32),
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((32, 16, 3), np.uint8),
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="need a uint8"):
        read_attributes(image)


def test_score_refuses_what_does_not_match():
    images, captions = make_shapes(2)
    with pytest.raises(ValueError, match="got 2 and 1"):
        score(images, captions[:1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        score([], [])
    with pytest.raises(ValueError, match="caption must be"):
        score(images, ["a cat", captions[1]])


@pytest.mark.parametrize("shape", AREA)
def test_area_and_drop_are_those_of_the_ideal_shape(shape):
    grid = np.arange(200) + 0.5 - 100
    ideal = shape_coverage(shape, grid, grid[:, None], 60)
    assert ideal.sum() == pytest.approx(AREA[shape] * 60**2, rel=1e-2)
    assert ideal.sum(1) @ grid / ideal.sum() == pytest.approx(DROP[shape] * 60, abs=0.2)
