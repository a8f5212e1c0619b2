"""Images with captions, in memory, and their split into training and held-out images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FEWEST_TO_SPLIT = 20  # below that every image is needed for training
MOST_HELD_OUT = 512  # enough to measure a loss to a per cent or so


class DataError(ValueError):
    """The data cannot be trained on; the message names the files and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images, uint8 (n, height, width, 3), their captions, and their names for messages.

    notes: remarks on the data for the user. skipped: files left out, and why. A line each.
    maps: the layout maps, of the shape of the images, or None. readable: these are the built-in
    shapes, so the attributes that a prompt asks for can be read back from an image by rule.
    """

    images: np.ndarray
    captions: Sequence[str]
    names: Sequence[str]
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    maps: np.ndarray | None = None
    readable: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, chosen: Sequence[int]) -> "Dataset":
        """Select the images of these indices."""
        captions, names = ([texts[i] for i in chosen] for texts in (self.captions, self.names))
        maps = None if self.maps is None else self.maps[chosen]
        return replace(self, images=self.images[chosen], captions=captions, names=names, maps=maps)

    def split(self, share: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """Split off about `share` of the images at random: → (training, held out).

        At most 512 are held out, and none where there are fewer than 20.
        """
        n = len(self)
        count = min(MOST_HELD_OUT, round(n * share)) if n >= FEWEST_TO_SPLIT else 0
        order = np.random.default_rng((seed, 5)).permutation(n)
        return self.pick(np.sort(order[count:])), self.pick(np.sort(order[:count]))

    def with_mirror_images(self) -> "Dataset":
        """Return these images, and a mirror image (left and right exchanged) of each."""

        def both(images):
            return np.concatenate([images, images[:, :, ::-1]])

        names = [*self.names, *(f"{name}, mirrored" for name in self.names)]
        maps = None if self.maps is None else both(self.maps)
        captions = [*self.captions] * 2
        return replace(self, images=both(self.images), captions=captions, names=names, maps=maps)

    def fingerprint(self) -> str:
        """Hash every pixel and caption, in hexadecimal: equal data, equal fingerprint."""
        digest = hashlib.sha256(f"{self.images.shape}".encode())
        for images in (self.images, self.maps):
            if images is not None:
                digest.update(np.ascontiguousarray(images))
        for caption in self.captions:
            digest.update(caption.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()[:16]
