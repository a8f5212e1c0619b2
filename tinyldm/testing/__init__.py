"""Check hand-written gradients, yours too: `check_gradients` finds which one is wrong, and why."""

from tinyldm.testing.diffusion import SamplerError, check_sampler, check_schedule
from tinyldm.testing.faults import assert_detects_faults
from tinyldm.testing.gradcheck import Undecided, check_gradients
from tinyldm.testing.orders import (
    check_jacobian,
    check_linear,
    check_live,
    check_second_order,
    check_taylor,
)
from tinyldm.testing.problem import GradientError

__all__ = [
    "GradientError",
    "SamplerError",
    "Undecided",
    "assert_detects_faults",
    "check_gradients",
    "check_jacobian",
    "check_linear",
    "check_live",
    "check_sampler",
    "check_schedule",
    "check_second_order",
    "check_taylor",
]
