"""Captioned shapes, the built-in data set: one coloured shape on a plain ground, drawn from a seed.

"a large red circle on blue at the left" names five attributes that an image either has or has
not, so generated images can be scored by rule. Five pairs of colour and shape are held out of
training altogether: a model that generates them anyway has learnt to compose.

Lengths are in pixels of the finished image and coordinates are continuous: pixel i spans
[i, i + 1), x grows to the right, y downwards.
"""

from dataclasses import asdict, dataclass, replace
from itertools import product
from math import ceil, floor

import numpy as np
from PIL import Image, ImageDraw

SIZES = {"small": (0.13, 0.17), "large": (0.24, 0.30)}  # range of r / side, r the half-extent
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 40),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
POSITIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}

VOCABULARY = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "background": COLOURS,
    "position": POSITIONS,
}
ATTRIBUTES = tuple(VOCABULARY)
ON_MAPS = {"circle": "red", "square": "green", "triangle": "blue"}  # on black, for every image

HELD_OUT = frozenset(  # (colour, shape) on any background: never in a training set
    {
        ("red", "triangle"),
        ("blue", "circle"),
        ("yellow", "square"),
        ("purple", "triangle"),
        ("orange", "circle"),
    }
)

JITTER = 1 / 32  # of the side, at most, each way
MIN_SIDE = 16  # in smaller images a small square and a small circle are the same few pixels
SUPERSAMPLING = 4
LANCZOS_REACH = 3  # a reduced pixel depends on what lies within 3 pixels of its centre


@dataclass(frozen=True)
class Attributes:
    """Attributes of an image. ValueError for an unknown word, or a shape in its ground's colour."""

    size: str
    colour: str
    shape: str
    background: str
    position: str

    def __post_init__(self):
        for name, words in VOCABULARY.items():
            word = getattr(self, name)
            if word not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, not {word!r}")
        if self.colour == self.background:
            raise ValueError(f"colour and background must differ, but both are {self.colour}")

    @classmethod
    def parse(cls, caption: str) -> "Attributes":
        """Parse a caption, the inverse of `caption`. ValueError for any other sentence."""
        match caption.split(" "):
            case ["a", size, colour, shape, "on", background, "at", "the", position]:
                return cls(size, colour, shape, background, position)
        raise ValueError(
            f"caption must be 'a SIZE COLOUR SHAPE on BACKGROUND at the POSITION', not {caption!r}"
        )

    @property
    def caption(self) -> str:
        """Return the caption, such as "a large red circle on blue at the left"."""
        return (
            f"a {self.size} {self.colour} {self.shape} on {self.background} at the {self.position}"
        )

    @property
    def on_map(self) -> "Attributes":
        """Return the attributes of the layout map: the same shape and place, coloured by kind."""
        return replace(self, colour=ON_MAPS[self.shape], background="black")

    @property
    def held_out(self) -> bool:
        """Return whether this pair of colour and shape is kept for the compositional score."""
        return (self.colour, self.shape) in HELD_OUT


def attributes_in(prompt: str) -> dict[str, str]:
    """Return {attribute: word} of a caption, or of a class: a shape. ValueError for other texts."""
    return {"shape": prompt} if prompt in SHAPES else asdict(Attributes.parse(prompt))


def combinations(held_out: bool = False) -> list[Attributes]:
    """List all combinations, in a fixed order: 1,330 for training, or the 350 held out of it."""
    every = (
        Attributes(size, colour, shape, background, position)
        for size, colour, shape, background, position in product(*VOCABULARY.values())
        if colour != background
    )
    return [attributes for attributes in every if attributes.held_out == held_out]


def centre(position: str, r: float, side: int) -> tuple[float, float]:
    """Return the centre (x, y) of a shape of half-extent r, before jitter."""
    # 0.22 of the side off the middle, less for a shape that would come within 1.5/32 of the edge.
    shift = min(side / 2 - r - 1.5 / 32 * side, 0.22 * side)
    right, down = POSITIONS[position]
    return side / 2 + right * shift, side / 2 + down * shift


def place(
    attributes: Attributes, rng: np.random.Generator, side: int
) -> tuple[float, float, float]:
    """Draw the geometry of one image from rng: its centre and half-extent (x, y, r)."""
    r = rng.uniform(*SIZES[attributes.size]) * side
    x, y = centre(attributes.position, r, side)
    jitter_x, jitter_y = rng.uniform(-1, 1, 2) * JITTER * side
    return x + jitter_x, y + jitter_y, r


def draw(attributes: Attributes, rng: np.random.Generator, side: int = 32) -> np.ndarray:
    """Draw an image, geometry from rng: uint8 (side, side, 3). ValueError below 16 pixels."""
    if side < MIN_SIDE:
        raise ValueError(f"side must be at least {MIN_SIDE} pixels, not {side}")
    return draw_at(attributes, *place(attributes, rng, side), side)


def draw_at(attributes: Attributes, x: float, y: float, r: float, side: int) -> np.ndarray:
    """Draw an image with this centre and half-extent, in pixels: uint8 (side, side, 3)."""
    background = COLOURS[attributes.background]
    large = Image.new("RGB", (SUPERSAMPLING * side, SUPERSAMPLING * side), background)
    fill_shape(ImageDraw.Draw(large), attributes, x, y, r)

    # Reduce the shape's neighbourhood alone: elsewhere the result is known to be plain background,
    # and reducing is what drawing an image spends its time on.
    reach = r + LANCZOS_REACH
    left, right = max(floor(x - reach), 0), min(ceil(x + reach), side)
    top, bottom = max(floor(y - reach), 0), min(ceil(y + reach), side)
    box = tuple(SUPERSAMPLING * edge for edge in (left, top, right, bottom))
    image = np.full((side, side, 3), background, np.uint8)
    image[top:bottom, left:right] = large.resize(
        (right - left, bottom - top), Image.Resampling.LANCZOS, box
    )
    return image


def fill_shape(
    canvas: ImageDraw.ImageDraw, attributes: Attributes, x: float, y: float, r: float
) -> None:
    """Fill the shape on a canvas SUPERSAMPLING times as large as the image."""

    def pixels(low, high):
        # Pillow fills both end pixels, so what reaches up to `high` ends on the pixel before it.
        return round(SUPERSAMPLING * low), round(SUPERSAMPLING * high) - 1

    fill = COLOURS[attributes.colour]
    match attributes.shape:
        case "circle":
            (left, right), (top, bottom) = pixels(x - r, x + r), pixels(y - r, y + r)
            canvas.ellipse((left, top, right, bottom), fill)
        case "square":
            half = 0.9 * r
            (left, right), (top, bottom) = pixels(x - half, x + half), pixels(y - half, y + half)
            canvas.rectangle((left, top, right, bottom), fill)
        case "triangle":
            (left, right), (top, bottom) = pixels(x - r, x + r), pixels(y - r, y + 0.8 * r)
            canvas.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill)


def make_shapes(
    n: int, side: int = 32, seed: int = 0, held_out: bool = False, maps: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Draw n images: uint8 (n, side, side, 3), and their captions.

    Captions are uniform over `combinations(held_out)`. Image i depends on (seed, i) alone, so the
    first images are the same whatever n is. ValueError for a side below 16 pixels.
    maps: instead of the images, their layouts: see `Attributes.on_map`.
    """
    choices = combinations(held_out)
    images, captions = np.empty((n, side, side, 3), np.uint8), []
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        attributes = choices[rng.integers(len(choices))]
        images[i] = draw(attributes.on_map if maps else attributes, rng, side)
        captions.append(attributes.caption)
    return images, captions
