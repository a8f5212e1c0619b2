"""Faster versions of the plain functions: nothing here is needed to understand the method.

Importing this package registers them all.
"""

import os

from tinyldm.kernels import (  # noqa: F401
    attention,
    cached,
    cuda,
    im2col,
    muon,
    nearest_codes,
    shared_steps,
)
from tinyldm.kernels.cpu import (  # noqa: F401
    activations,
    adamw,
    group_norm,
    layer_norm,
    linear,
    parallel,
    pointwise,
    winograd,
)
from tinyldm.kernels.registry import plain

__all__ = ["plain"]

_asked = os.environ.get("TINYLDM_KERNELS", "")
if _asked == "plain":
    plain().__enter__()  # to the end of the process
elif _asked:
    raise ValueError(f'TINYLDM_KERNELS: expected "plain" or nothing, found {_asked!r}')
