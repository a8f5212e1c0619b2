"""Check hand-written gradients, yours too: `check_gradients` finds which one is wrong."""

from tinyldm.testing.gradcheck import GradientError, check_gradients

__all__ = ["GradientError", "check_gradients"]
