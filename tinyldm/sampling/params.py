"""What a batch of pictures depends on, beside the weights and the pictures it may begin with."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from tinyldm.config import unknown
from tinyldm.diffusion.samplers import SAMPLERS


@dataclass(frozen=True)
class Recipe:
    """Complete, and checked: ValueError where a number is not what is expected.

    strength: which share of the steps a given picture goes through; None where there is none.
    rescale: 0…1, of the guidance, see `guided`.
    variation: 0…1, how far the noise of every picture is from that of the first, in a direction
    that (variation_seed, i) decides; None where every picture has noise of its own.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]  # as many
    steps: int
    guidance: float
    sampler: str
    seed: int
    height: int  # pixels
    width: int
    strength: float | None = None
    rescale: float = 0.0
    variation: float | None = None
    variation_seed: int = 0

    def __post_init__(self):
        n = len(self.prompts)
        if n == 0:
            raise ValueError("prompt: expected at least one")
        if len(self.negatives) != n:
            raise ValueError(f"negative_prompt: expected one, or {n}, found {len(self.negatives)}")
        for name in ("steps", "seed", "variation_seed", "height", "width"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"{name}: expected a whole number, found {getattr(self, name)!r}")
        for name in ("guidance", "strength", "rescale", "variation"):
            if not isinstance(getattr(self, name), (Real, type(None))):
                raise ValueError(f"{name}: expected a number, found {getattr(self, name)!r}")
        if self.steps < 1:
            raise ValueError(f"steps: expected 1 or more, found {self.steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: expected a finite number, found {self.guidance}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: {unknown(self.sampler, SAMPLERS)}")
        for name in ("seed", "variation_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in ("rescale", "variation"):
            number = getattr(self, name)
            if number is not None and not 0 <= number <= 1:
                raise ValueError(f"{name}: expected 0…1, found {number}")
        if self.strength is not None and not (0 < self.strength <= 1 and self.steps_taken >= 1):
            least = math.ceil(1000 / self.steps) / 1000
            raise ValueError(
                f"strength: expected {least:g}…1, which is one of {self.steps} steps "
                f"to all of them, found {self.strength}"
            )

    @property
    def steps_taken(self) -> int:
        """All, or of a given picture the last ones."""
        return self.steps if self.strength is None else int(self.steps * self.strength)
