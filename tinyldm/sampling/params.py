"""The parameters of one sampling call, validated."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from tinyldm.config import brief
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.options import check_options, option

BY_RUN = "the run's"  # the default, where the model's folder states it


@dataclass(frozen=True)
class SamplingParams:
    """All parameters of a sampling call, besides the weights and the init image or mask.

    Raises ValueError for a value that is not what is expected.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]  # one per prompt
    height: int  # of the images, pixels
    width: int
    steps: int = option("number of sampling steps", least=1, default_text=BY_RUN)
    guidance: float = option(
        "guidance scale; 1 is no guidance", least=-1000, most=1000, default_text=BY_RUN
    )
    sampler: str = option(f"sampler: {', '.join(SAMPLERS)}", choices=SAMPLERS, default_text=BY_RUN)
    seed: int = option("seed of the noise", least=0, default_text="0")
    strength: float | None = option(
        "share of the steps applied to the init image", None, least=0.001, most=1,
        default_text="0.8, with a mask 1",
    )  # fmt: skip
    rescale: float = option(
        "guidance rescale against over-saturation (Lin et al. 2023)", 0.0, least=0, most=1
    )
    variation: float | None = option(
        "distance of each image from that of the seed, each in another direction", None,
        least=0, most=1, default_text="none",
    )  # fmt: skip
    variation_seed: int = option("seed of the directions of --variation", 0, least=0)
    tile: int | None = option(
        "side of the tiles in which to decode, in pixels, for less memory; 0 for no tiles", None,
        least=0, default_text="512 above 768×768",
    )  # fmt: skip

    def __post_init__(self):
        n = len(self.prompts)
        if n == 0:
            raise ValueError("prompt: expected at least one")
        if len(self.negative_prompts) != n:
            raise ValueError(
                f"negative_prompt: expected one, or {n}, found {len(self.negative_prompts)}"
            )
        self._check_strength()
        check_options(self)

    def _check_strength(self):
        """Check the strength, whose range depends on the steps: it must leave one at least."""
        if not isinstance(self.strength, Real) or not isinstance(self.steps, Integral):
            return
        if self.steps >= 1 and not (0 < self.strength <= 1 and self.steps_taken >= 1):
            least = math.ceil(1000 / self.steps) / 1000
            raise ValueError(
                f"strength: expected {least:g}…1, which is one of {self.steps} steps "
                f"to all of them, found {brief(self.strength)}"
            )

    @property
    def steps_taken(self) -> int:
        """Return the number of steps taken: all, or with an init image the last ones."""
        return self.steps if self.strength is None else int(self.steps * self.strength)


def texts(name: str, given: object) -> tuple[str, ...]:
    """Return a text, or several, as a tuple. ValueError for anything else."""
    several = (given,) if isinstance(given, str) else given
    try:
        several = tuple(several)
    except TypeError:
        several = (None,)
    if wrong := [text for text in several if not isinstance(text, str)]:
        among = f" among {len(several)}" if len(several) > 1 else ""
        found = wrong[0] if among else given
        raise ValueError(f"{name}: expected a text or a list of texts, found {brief(found)}{among}")
    return several


def check_array(name: str, x: object, kind: str, wanted: str) -> None:
    """Raise ValueError for all but an array with four axes and numbers of this kind (NumPy's)."""
    if getattr(x, "ndim", None) != 4 or x.dtype.kind != kind:
        found = f"{x.dtype} {x.shape}" if hasattr(x, "dtype") else brief(x)
        raise ValueError(f"{name}: expected {wanted}, found {found}")
