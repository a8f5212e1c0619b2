"""Weights, moments and averages in one buffer each.

A network has hundreds of small arrays; one by one, most of a step of the optimizer would go into
calls.
"""

import bisect
import math
from collections.abc import Collection

import numpy as np

from tinyldm.backend import Array, on_host
from tinyldm.kernels.cpu import processes
from tinyldm.kernels.workspace import empty


class Flat(dict):
    """A dict {name: array} whose arrays are views of one buffer, `flat`, copied from `named`.

    In the buffer those named in `first` come first, then the other matrices and kernels: only they
    have weight decay, `decayed` elements together.
    `shared`: on the CPU, forked copies of this process read and write the same memory.
    """

    def __init__(self, arrays: dict[str, Array], shared: bool = False, first: Collection[str] = ()):
        order = sorted(arrays, key=lambda name: (name not in first, arrays[name].ndim <= 1))
        self.first = first
        sizes = [arrays[name].size for name in order]
        self.order, self.starts = order, np.cumsum([0, *sizes]).tolist()
        self.positions = {name: i for i, name in enumerate(order)}
        self.decayed = sum(arrays[name].size for name in order if arrays[name].ndim > 1)
        self.flat = empty((self.starts[-1],), *arrays.values())
        self.shared = shared and on_host(self.flat)
        if self.shared:
            self.flat = processes.shared(self.flat.size, self.flat.dtype)
        parts = views(self.flat, {name: arrays[name].shape for name in order})
        super().__init__({name: parts[name] for name in arrays})
        for name, w in arrays.items():
            self[name][...] = w

    def span(self, names: list[str]) -> slice:
        """Return the part of the buffer where these names lie, which follow one another there."""
        start = self.positions[names[0]]
        return slice(self.starts[start], self.starts[start + len(names)])

    def copy(self) -> "Flat":
        """Copy the values into another buffer."""
        return Flat(self, first=self.first)

    def parts(self, start: int, stop: int) -> list[tuple[str, slice, slice]]:
        """List the arrays in start…stop of the buffer: (name, slice of it, slice from start)."""
        found = []
        i = bisect.bisect_right(self.starts, start) - 1
        while i < len(self.order) and self.starts[i] < stop:
            begin, end = max(start, self.starts[i]), min(stop, self.starts[i + 1])
            inside = slice(begin - self.starts[i], end - self.starts[i])
            found.append((self.order[i], inside, slice(begin - start, end - start)))
            i += 1
        return found


def views(flat: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return the arrays of these shapes that lie side by side in a buffer, as views of it."""
    found, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        found[name] = flat[start:stop].reshape(shape)
        start = stop
    return found


def with_gradients(grads: dict[str, Array], *buffers: dict[str, Array]) -> list[str] | None:
    """List the names that have gradients in the order in which they lie side by side in `buffers`.

    None where they do not, or not all of them are Flat and in the same order.
    """
    first = buffers[0]
    if not grads or not all(isinstance(x, Flat) and x.order == first.order for x in buffers):
        return None
    if not grads.keys() <= first.positions.keys():
        return None
    start = min(first.positions[name] for name in grads)
    names = first.order[start : start + len(grads)]
    return names if grads.keys() == set(names) else None
