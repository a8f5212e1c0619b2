"""Training of both stages, and the state that survives interruptions."""

from tinyldm.training.step import value_and_grad

__all__ = ["value_and_grad"]
