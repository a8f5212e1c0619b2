"""The embedded data set: captions, what is held out, repeatability, geometry of the images."""

import json
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tinyldm.data import shapes
from tinyldm.data.shapes import (
    COLOURS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    SUPERSAMPLING,
    Attributes,
    centre,
    combinations,
    draw,
    make_shapes,
    place,
)

SAMPLE = Path(__file__).parents[2] / "data" / "shapes"
EVERY = combinations(held_out=False) + combinations(held_out=True)

attributes_ = st.sampled_from(EVERY)
seeds = st.integers(0, 2**32 - 1)
sides = st.sampled_from([16, 17, 32, 50, 64])


def coverage(image, attributes):
    """How much of each pixel the shape covers: 0 is background, 1 is shape, (side, side)."""
    ground = np.array(COLOURS[attributes.background], float)
    towards = COLOURS[attributes.colour] - ground
    return (image - ground) @ towards / (towards @ towards)


def inside(shape, dx, dy, r):
    """Whether points at offsets (dx, dy) from the centre lie in the ideal shape."""
    if shape == "circle":
        return dx**2 + dy**2 <= r**2
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= 0.9 * r
    # Between the apex (0, -r) and the base at 0.8 r, where the half width has grown from 0 to r.
    return (dy <= 0.8 * r) & (abs(dx) <= (dy + r) / 1.8)


def ideal_coverage(shape, x, y, r, side, fine=8):
    """The ideal shape's share of each pixel, from fine × fine points in it: (side, side)."""
    points = (np.arange(side * fine) + 0.5) / fine
    hits = inside(shape, points - x, points[:, None] - y, r)
    return hits.reshape(side, fine, side, fine).mean((1, 3))


def rounded_coverage(shape, x, y, r, side, fine=8):
    """Compute each pixel's share inside the drawn outline, whose edges are on whole fine pixels."""
    half = 0.9 * r if shape == "square" else r
    ends = x - half, x + half, y - half, y + (0.8 * r if shape == "triangle" else half)
    left, right, top, bottom = (round(SUPERSAMPLING * end) / SUPERSAMPLING for end in ends)
    points = (np.arange(side * fine) + 0.5) / fine
    across = (2 * points - left - right) / (right - left)  # −1…1 from edge to edge
    down = (2 * points[:, None] - top - bottom) / (bottom - top)
    hits = {
        "circle": across**2 + down**2 <= 1,
        "square": np.maximum(abs(across), abs(down)) <= 1,
        "triangle": (abs(down) <= 1) & (abs(across) <= (down + 1) / 2),
    }[shape]
    return hits.reshape(side, fine, side, fine).mean((1, 3))


# Captions


def test_the_caption_reads_as_in_the_documentation():
    attributes = Attributes("large", "red", "circle", "blue", "left")
    assert attributes.caption == "a large red circle on blue at the left"


def test_every_caption_parses_back():
    assert [Attributes.parse(attributes.caption) for attributes in EVERY] == EVERY


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a large red circle on blue",
        "a large red circle on blue at the left.",
        "a  large red circle on blue at the left",
        "A large red circle on blue at the left",
        "a huge red circle on blue at the left",
        "a large pink circle on blue at the left",
        "a large red circle on red at the left",
        "a large red circle on blue at the centre",
    ],
)
def test_any_other_sentence_is_refused_in_one_line(caption):
    with pytest.raises(ValueError) as error:
        Attributes.parse(caption)
    assert "\n" not in str(error.value)


@given(st.text())
def test_parse_raises_nothing_but_value_error(text):
    with pytest.raises(ValueError):
        Attributes.parse(text)


# Combinations


def test_combinations_are_all_there_once():
    assert len(combinations()) == 1330 and len(combinations(held_out=True)) == 350
    assert len(set(EVERY)) == 2 * 8 * 3 * 7 * 5
    assert all(attributes.colour != attributes.background for attributes in EVERY)


def test_held_out_pairs_are_apart():
    seen = {(attributes.colour, attributes.shape) for attributes in combinations()}
    kept = {(attributes.colour, attributes.shape) for attributes in combinations(held_out=True)}
    assert kept == HELD_OUT and not seen & kept and len(seen | kept) == 8 * 3


def columns(drawn):
    """All sizes, all colours, …"""
    return zip(*map(astuple, drawn), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_sets_hold_only_their_own_captions_and_uniformly(held_out):
    _, captions = make_shapes(3000, side=16, seed=1, held_out=held_out)
    drawn = [Attributes.parse(caption) for caption in captions]
    assert all(attributes.held_out == held_out for attributes in drawn)
    choices = combinations(held_out)
    for words, expected in zip(columns(drawn), columns(choices), strict=True):
        counts, share = Counter(words), Counter(expected)
        assert counts.keys() == share.keys()
        for word in share:
            p = share[word] / len(choices)
            assert abs(counts[word] / 3000 - p) < 5 * np.sqrt(p * (1 - p) / 3000)


# Repeatability


@given(seeds, st.integers(0, 6), st.booleans())
@settings(deadline=None, max_examples=20)
def test_a_prefix_does_not_depend_on_n(seed, n, held_out):
    images, captions = make_shapes(8, 16, seed, held_out)
    first, first_captions = make_shapes(n, 16, seed, held_out)
    assert np.array_equal(first, images[:n]) and first_captions == captions[:n]


def test_seeds_differ_and_repeat():
    once, again, other = make_shapes(20, seed=3), make_shapes(20, seed=3), make_shapes(20, seed=4)
    assert np.array_equal(once[0], again[0]) and once[1] == again[1]
    assert not np.array_equal(once[0], other[0]) and once[1] != other[1]


def test_shapes_and_types():
    images, captions = make_shapes(5, side=24)
    assert images.shape == (5, 24, 24, 3) and images.dtype == np.uint8 and len(captions) == 5
    assert make_shapes(0)[0].shape == (0, 32, 32, 3) and make_shapes(0)[1] == []


def test_too_small_a_side_is_refused():
    with pytest.raises(ValueError, match="at least 16 pixels, not 15"):
        make_shapes(1, side=15)


def test_the_committed_sample_is_what_the_code_draws():
    images, captions = make_shapes(24)
    lines = (SAMPLE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    for image, caption, line in zip(images, captions, lines, strict=True):
        entry = json.loads(line)
        assert entry["text"] == caption
        stored = np.asarray(Image.open(SAMPLE / entry["file_name"]), int)
        assert abs(stored - image).max() <= 1  # one level for another version's resampling


# Geometry


@given(attributes_, seeds, sides)
@settings(deadline=None)
def test_place_keeps_to_the_ranges(attributes, seed, side):
    x, y, r = place(attributes, np.random.default_rng(seed), side)
    low, high = SIZES[attributes.size]
    assert low * side <= r <= high * side
    px = side / 32
    right, down = POSITIONS[attributes.position]
    shift = min(side / 2 - r - 1.5 * px, 0.22 * side)
    assert abs(x - side / 2 - right * shift) <= px * (1 + 1e-9)
    assert abs(y - side / 2 - down * shift) <= px * (1 + 1e-9)
    assert r + 0.49 * px <= min(x, y, side - x, side - y)  # jitter leaves half a pixel to the edge


def test_centre_by_hand():
    assert centre("center", 5, 32) == (16, 16)
    assert centre("left", 5, 32) == pytest.approx((16 - 7.04, 16))  # 0.22 of the side
    assert centre("bottom", 9, 32) == pytest.approx((16, 16 + 5.5))  # 1.5 px to the edge
    assert centre("bottom", 18, 64) == pytest.approx((32, 32 + 11))


@given(attributes_, seeds, sides)
@settings(deadline=None)
def test_the_image_shows_the_drawn_geometry(attributes, seed, side):
    image = draw(attributes, np.random.default_rng(seed), side)
    x, y, r = place(attributes, np.random.default_rng(seed), side)
    seen = coverage(image, attributes)
    ideal = ideal_coverage(attributes.shape, x, y, r, side)

    # Drawing rounds outlines to a quarter of a pixel; the area follows by that times the perimeter.
    assert abs(seen.sum() - ideal.sum()) < 0.15 * 7 * r
    # The centre is that of the rounded outline, within half a pixel of the larger canvas.
    rounded = rounded_coverage(attributes.shape, x, y, r, side)
    grid = np.arange(side) + 0.5
    for axis in (0, 1):
        middle = seen.sum(axis) @ grid / seen.sum()
        assert abs(middle - rounded.sum(axis) @ grid / rounded.sum()) < 0.5 / SUPERSAMPLING
    # The box of pixels that are covered by more than half.
    for covered, expected in zip(np.nonzero(seen > 0.5), np.nonzero(ideal > 0.5), strict=True):
        assert abs(covered.min() - expected.min()) <= 1
        assert abs(covered.max() - expected.max()) <= 1


def test_shapes_are_drawn_without_bias():
    # One image is off by the rounding of its outline; on average nothing may be left of it.
    for shape in SHAPES:
        attributes = Attributes("small", "black", shape, "white", "center")
        off = []
        for seed in range(300):
            x, y, r = place(attributes, np.random.default_rng(seed), 32)
            seen = coverage(draw(attributes, np.random.default_rng(seed)), attributes)
            grid = np.arange(32) + 0.5
            drop = 0.2 * r if shape == "triangle" else 0  # from the centre to the centre of mass
            off.append(
                (seen.sum(0) @ grid / seen.sum() - x, seen.sum(1) @ grid / seen.sum() - y - drop)
            )
        assert abs(np.mean(off, axis=0)).max() < 0.05


@given(attributes_, seeds, sides)
@settings(deadline=None)
def test_colours_are_exact_away_from_the_outline(attributes, seed, side):
    image = draw(attributes, np.random.default_rng(seed), side)
    x, y, r = place(attributes, np.random.default_rng(seed), side)
    # Lanczos mixes what lies within 3 px along each axis, so ask of a box that is a little larger.
    steps = np.linspace(-3.3, 3.3, 23)
    grid = np.arange(side) + 0.5
    near = np.stack(
        [
            inside(attributes.shape, grid + dx - x, grid[:, None] + dy - y, r)
            for dx in steps
            for dy in steps
        ]
    )
    assert (image[near.all(0)] == COLOURS[attributes.colour]).all()
    assert (image[~near.any(0)] == COLOURS[attributes.background]).all()


def test_the_middle_of_every_shape_has_its_colour():
    for i, attributes in enumerate(EVERY):
        x, y, r = place(attributes, np.random.default_rng(i), 32)
        image = draw(attributes, np.random.default_rng(i), 32)
        middle = image[int(y), int(x)].astype(int)  # may ring a little in the smallest shapes
        assert abs(middle - COLOURS[attributes.colour]).max() <= 24


@given(attributes_, seeds, sides)
@settings(deadline=None, max_examples=50)
def test_reducing_the_neighbourhood_alone_changes_nothing(attributes, seed, side):
    geometry = place(attributes, np.random.default_rng(seed), side)
    whole = Image.new("RGB", (SUPERSAMPLING * side,) * 2, COLOURS[attributes.background])
    shapes.fill_shape(ImageDraw.Draw(whole), attributes, *geometry)
    expected = np.asarray(whole.resize((side, side), Image.Resampling.LANCZOS))
    assert np.array_equal(draw(attributes, np.random.default_rng(seed), side), expected)
