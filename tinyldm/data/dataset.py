"""Pictures with captions, in memory: what training sees, and what it never sees."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FEWEST_TO_SPLIT = 20  # below that every picture is needed for training
MOST_HELD_OUT = 512  # enough to measure a loss to a per cent or so


class DataError(ValueError):
    """The data cannot be trained on; the message names the files and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Pictures, uint8 (n, height, width, 3), their captions, and names by which to speak of them.

    remarks: what a person should know of them. skipped: files left out, and why. A line each.
    maps: what says where things are, for layout: pictures like them, or none. readable: these are
    the embedded shapes, and what a prompt asks for can be read back from a picture by rule.
    """

    images: np.ndarray
    captions: Sequence[str]
    names: Sequence[str]
    remarks: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    maps: np.ndarray | None = None
    readable: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, chosen: Sequence[int]) -> "Dataset":
        """Only the pictures of these indices."""
        captions, names = ([texts[i] for i in chosen] for texts in (self.captions, self.names))
        maps = None if self.maps is None else self.maps[chosen]
        return replace(self, images=self.images[chosen], captions=captions, names=names, maps=maps)

    def split(self, share: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """(for training, held out of it): about `share` of the pictures, at random, are kept away.

        At most 512 of them, and none of fewer than 20.
        """
        n = len(self)
        count = min(MOST_HELD_OUT, round(n * share)) if n >= FEWEST_TO_SPLIT else 0
        order = np.random.default_rng((seed, 5)).permutation(n)
        return self.pick(np.sort(order[count:])), self.pick(np.sort(order[:count]))

    def with_mirror_images(self) -> "Dataset":
        """The same, and each picture once more with left and right exchanged."""

        def both(pictures):
            return np.concatenate([pictures, pictures[:, :, ::-1]])

        names = [*self.names, *(f"{name}, mirrored" for name in self.names)]
        maps = None if self.maps is None else both(self.maps)
        captions = [*self.captions] * 2
        return replace(self, images=both(self.images), captions=captions, names=names, maps=maps)

    def fingerprint(self) -> str:
        """A hash of every pixel and caption, in hexadecimal: equal data, equal fingerprint."""
        digest = hashlib.sha256(f"{self.images.shape}".encode())
        for pictures in (self.images, self.maps):
            if pictures is not None:
                digest.update(np.ascontiguousarray(pictures))
        for caption in self.captions:
            digest.update(caption.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()[:16]
