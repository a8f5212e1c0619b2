"""What a network attends to, where that stays the same from step to step."""

from collections.abc import Callable
from typing import Any

from tinyldm.backend import Array
from tinyldm.nn.layers import Layer


class FixedContext:
    """A context (n, l, d) for many steps of sampling: what layers make of it alone is made once.

    A network takes it in place of the array, under `no_grad` and with the same parameters always.
    """

    def __init__(self, array: Array):
        self.array, self._made = array, {}

    def made(self, layer: Layer, make: Callable[[Array], Any]) -> Any:
        """`make(array)`, of the first time that this layer asked."""
        if layer not in self._made:
            self._made[layer] = make(self.array)
        return self._made[layer]
