"""Attribute reader: reads the attributes of a shape back from its image, by rule, not a network.

The reader is given the image alone, not the caption. It measures the two colours and how much of
each pixel the shape covers, and takes the circle, square or triangle that explains this best.
Every image gets an answer, the best guess.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from tinyldm.data.shapes import (
    ATTRIBUTES,
    COLOURS,
    JITTER,
    POSITIONS,
    SHAPES,
    SIZES,
    Attributes,
    attributes_in,
    centre,
    draw_at,
)

# A shape of half-extent r has the area AREA · r², and its centre of mass DROP · r below its centre.
AREA = {"circle": np.pi, "square": 1.8 * 1.8, "triangle": 0.5 * 2 * 1.8}
DROP = {"circle": 0, "square": 0, "triangle": (-1 + 0.8 + 0.8) / 3}


def read_attributes(image: np.ndarray) -> Attributes:
    """Read the attributes of a uint8 image (side, side, 3). ValueError for any other array."""
    side = len(image) if image.ndim else 0
    if image.dtype != np.uint8 or image.shape != (side, side, 3) or side == 0:
        raise ValueError(f"need a uint8 (side, side, 3) image, got {image.dtype} {image.shape}")
    pixels = image.astype(np.float64)
    ground, ink = seen_colours(pixels)
    background = nearest_colour(ground, COLOURS)
    colour = nearest_colour(ink, [name for name in COLOURS if name != background])

    # Coverage: 0 where a pixel has the colour of the ground, 1 where it has that of the shape.
    towards = ink - ground
    coverage = (pixels - ground) @ towards / max(towards @ towards, 1)  # (side, side)
    shape, x, y, r = fit_shape(np.clip(coverage, 0, 1))

    size = min(SIZES, key=lambda name: abs(r / side - np.mean(SIZES[name])))
    r = side * np.clip(r / side, *SIZES[size])  # where the ideal centres are depends on r
    away = {name: np.hypot(*np.subtract(centre(name, r, side), (x, y))) for name in POSITIONS}
    position = min(away, key=away.get)
    return Attributes(size, colour, shape, background, position)


def seen_colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure the colours of ground and shape, two rgb vectors, in float (side, side, 3)."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)  # shapes stay clear of it, stray pixels are outvoted

    # The pixels that differ most from the ground are the shape's own, those on its outline are
    # mixed. The peak passes over the top 1 %, maybe outliers; the smallest shapes cover 3 %.
    contrast = np.linalg.norm(pixels - ground, axis=2)
    peak = np.quantile(contrast, 0.99)
    return ground, np.median(pixels[contrast >= 0.8 * peak], axis=0)


def nearest_colour(rgb: np.ndarray, names: Iterable[str]) -> str:
    """Return the name of the colour that is nearest to rgb."""
    return min(names, key=lambda name: np.square(COLOURS[name] - rgb).sum())


def fit_shape(coverage: np.ndarray) -> tuple[str, float, float, float]:
    """Fit the (shape, x, y, r) nearest to a coverage (side, side) in [0, 1], lengths in pixels."""
    # Area and centre of mass hardly change with blur, but faint noise far away adds to them: a
    # steeper coverage drops it, and moves no edge because it is the same at one half.
    # The tiny constant puts the centre of an empty image in the middle.
    mass = np.clip(2 * coverage - 0.5, 0, 1) + 1e-6
    grid = np.arange(len(mass)) + 0.5  # pixel centres
    area = mass.sum()
    mass_x, mass_y = mass.sum(0) @ grid / area, mass.sum(1) @ grid / area

    def candidate(shape):
        r = np.sqrt(area / AREA[shape])
        y = mass_y - DROP[shape] * r
        ideal = shape_coverage(shape, grid - mass_x, grid[:, None] - y, r)
        return np.square(ideal - coverage).sum(), (shape, mass_x, y, r)

    return min(candidate(shape) for shape in SHAPES)[1]


def shape_coverage(shape: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Compute the share of pixels at offsets (dx, dy) from its centre that a shape covers, 0…1."""
    match shape:  # distance from the outline, negative inside
        case "circle":
            distance = np.hypot(dx, dy) - r
        case "square":
            distance = np.maximum(abs(dx), abs(dy)) - 0.9 * r
        case "triangle":
            # The slanted sides run from (0, -r) to (±r, 0.8 r), so their normal is (±1.8, -1).
            slanted = (1.8 * abs(dx) - (dy + r)) / np.hypot(1.8, 1)
            distance = np.maximum(slanted, dy - 0.8 * r)
    return np.clip(0.5 - distance, 0, 1)  # the outline is one pixel soft


def drawing_distance(image: np.ndarray, attributes: Attributes) -> float:
    """Measure how far an image is from the nearest true drawing of its attributes.

    Root mean square difference in levels of 255, of a uint8 image (side, side, 3). The geometry is
    searched within its ranges, each number by itself in ever smaller steps.
    """
    side, (smallest, largest) = len(image), SIZES[attributes.size]
    pixels = image.astype(np.float64)

    def distance(geometry):
        share, right, down = geometry  # each in −1…1 of its range
        r = side * (smallest + largest + share * (largest - smallest)) / 2
        x, y = centre(attributes.position, r, side)
        jitter = JITTER * side
        drawn = draw_at(attributes, x + right * jitter, y + down * jitter, r, side)
        return np.sqrt(np.square(drawn - pixels).mean())

    best = np.zeros(3)
    least = distance(best)
    for step in (0.5, 0.5, 0.25, 0.25, 0.125, 0.0625):
        for move in np.concatenate([np.eye(3), -np.eye(3)]):
            there = np.clip(best + step * move, -1, 1)
            if (found := distance(there)) < least:
                best, least = there, found
    return float(least)


def box_around(image: np.ndarray, margin: int) -> np.ndarray:
    """Return bool (h, w), True in the box around the shape, `margin` pixels larger on each side."""
    pixels = image.astype(np.float64)
    ground, ink = seen_colours(pixels)
    contrast = np.linalg.norm(pixels - ground, axis=2)
    shown = contrast > 0.2 * np.linalg.norm(ink - ground)
    box = np.zeros(shown.shape, bool)
    rows, columns = (np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0))
    top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
    box[top : rows[-1] + 1 + margin, left : columns[-1] + 1 + margin] = True
    return box


def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
    """Compute the fraction of images that match their prompts: {attribute: 0 … 1, "all": 0 … 1}.

    prompts: captions, or classes, which name the shape alone. ValueError for a prompt that is
    neither, for unequal numbers, or for no image at all.
    """
    if len(images) != len(prompts) or len(images) == 0:
        raise ValueError(f"need a caption per image, got {len(images)} and {len(prompts)}")
    said = [attributes_in(prompt) for prompt in prompts]
    seen = [read_attributes(image) for image in images]
    right = {
        name: np.array([getattr(a, name) == b[name] for a, b in zip(seen, said, strict=True)])
        for name in ATTRIBUTES
        if all(name in words for words in said)
    }
    right["all"] = np.logical_and.reduce(list(right.values()))
    return {name: float(hits.mean()) for name, hits in right.items()}
