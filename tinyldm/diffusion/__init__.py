"""The mathematics of diffusion, on arrays and callables, never a network."""

from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.diffusion.schedule import Schedule

__all__ = ["SAMPLERS", "Schedule"]
