"""Cached results for inputs that stay the same, such as the text over all steps of sampling.

    with fixed(context):
        for t in steps:
            unet(params, x, t, context)  # what follows from the context alone is computed once

On any device; a kernel of every function on the way from the context into the network.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator

from tinyldm.backend import Array
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.nn.protocol import is_recording

TWINS = (
    "nn.functional.linear",
    "nn.functional.mean",
    "nn.functional.offset",
    "nn.functional.concatenate",
    "nn.norms.layer_norm",
    "nn.attention.attention",
)
_results: dict[int, dict] = {}  # id of a fixed array → {what was computed from it: the result}


@contextlib.contextmanager
def fixed(*arrays: Array) -> Iterator[None]:
    """Compute what follows from these arrays and from parameters once, within a `with` block.

    It holds under `no_grad` alone. Nothing may write to the arrays or the parameters meanwhile.
    """
    for x in arrays:
        _results[id(x)] = {}
    try:
        yield
    finally:
        for x in arrays:
            _forget(id(x))


def _forget(key):
    for y, _ in _results.pop(key, {}).values():
        _forget(id(y))


def _cost(x, *_, **__):
    known = _results and id(x) in _results and not is_recording()
    return -NEVER if known else NEVER  # before all others: there may be nothing to compute


def cached(twin: str) -> Callable:
    """Make the caching kernel of a plain function whose first array may be fixed."""
    module, _, name = twin.rpartition(".")
    plain = getattr(importlib.import_module(f"tinyldm.{module}"), name).__wrapped__

    def apply(x, *others, **options):
        found = _results.get(id(x), {})
        key = (name, *map(id, others), *options.items())
        if key not in found:
            y, backward = plain(x, *others, **options)
            if id(x) not in _results:
                return y, backward
            found[key] = y, others  # kept, so that no other array takes their ids
            _results[id(y)] = {}
        return found[key][0], None

    apply.__name__ = f"cached_{name}"
    return kernel(twin, cost=_cost)(apply)


FUNCTIONS = [cached(twin) for twin in TWINS]
