"""Random numbers of sampling: drawn on the host, one stream per image, the same everywhere."""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from numpy.random import Generator

from tinyldm.backend import Array
from tinyldm.config import brief


def streams(seed: int, n: int) -> list[Generator]:
    """Return a random stream for each of n images; that of image i depends on (seed, i) alone."""
    return [np.random.default_rng((seed, i)) for i in range(n)]


def variation_streams(seed: int, n: int) -> list[Generator]:
    """Return the streams for the directions of variations; none is one of `streams`."""
    return [np.random.default_rng((seed, i, 1)) for i in range(n)]


def draw(streams: Sequence[Generator], shape: tuple[int, ...]) -> np.ndarray:
    """Draw the next standard normal values of each stream, float32 (n, *shape)."""
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


def slerp(a: np.ndarray, b: np.ndarray, amount: float) -> np.ndarray:
    """Spherical interpolation from a to b (n, …), on the great circle (Shoemake 1985).

    amount: 0 is a, 1 is b. Normal values stay about normal; on the straight line they would be too
    small. For nearly parallel directions it is that line.
    """
    axes = tuple(range(1, a.ndim))
    lengths = (np.square(x, dtype=np.float64).sum(axes, keepdims=True) for x in (a, b))
    cosine = (a * np.float64(1) * b).sum(axes, keepdims=True) / np.sqrt(np.prod(list(lengths), 0))
    angle = np.arccos(np.clip(cosine, -1, 1))
    sine = np.sin(angle)
    near = sine < 1e-4
    sine = np.where(near, 1, sine)
    of_a = np.where(near, 1 - amount, np.sin((1 - amount) * angle) / sine)
    of_b = np.where(near, amount, np.sin(amount * angle) / sine)
    return (of_a * a + of_b * b).astype(a.dtype)


def given(xp: ModuleType, latents: object, shape: tuple[int, ...]) -> Array:
    """Return the latents that a caller gives, in float32. ValueError for others than this shape.

    Their numbers are finite and real.
    """
    try:
        x = xp.asarray(latents)
    except (TypeError, ValueError):
        x = None
    if x is None or x.dtype.kind not in "fiub":
        found = brief(latents) if x is None or x.dtype.kind != "c" else "complex ones"
        raise ValueError(f"latents: expected numbers {shape}, found {found}")
    if x.shape != shape:
        raise ValueError(f"latents: expected {shape}, found {x.shape}")
    if not (abs(x) <= np.finfo(np.float32).max).all():
        raise ValueError("latents: expected finite numbers, of float32, found others")
    return x.astype(np.float32)
