"""Exercises: a line of the source is left out, you write it, and it is checked.

`tinyldm exercise` lists them.
"""

from tinyldm.exercises import diffusion, layers, training
from tinyldm.exercises.exercise import Exercise, NotYet, check

EXERCISES: tuple[Exercise, ...] = (
    *layers.EXERCISES, *diffusion.EXERCISES, *training.EXERCISES,
)  # fmt: skip

__all__ = ["EXERCISES", "Exercise", "NotYet", "check"]
