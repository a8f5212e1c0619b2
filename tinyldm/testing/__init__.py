"""Check hand-written gradients, yours too: `check_gradients` finds which one is wrong."""

from tinyldm.testing.gradcheck import Undecided, check_gradients
from tinyldm.testing.problem import GradientError

__all__ = ["GradientError", "Undecided", "check_gradients"]
