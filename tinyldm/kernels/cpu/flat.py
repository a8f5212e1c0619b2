"""Weights, moments and averages in one buffer each.

A network has hundreds of small arrays; one by one, most of a step of the optimizer would go into
calls.
"""

import bisect
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
        self.decayed = sum(arrays[name].size for name in order if arrays[name].ndim > 1)
        self.flat = empty((self.starts[-1],), *arrays.values())
        self.shared = shared and on_host(self.flat)
        if self.shared:
            self.flat = processes.shared(self.flat.size, self.flat.dtype)
        spans = {name: slice(*self.starts[i : i + 2]) for i, name in enumerate(order)}
        super().__init__({n: self.flat[spans[n]].reshape(w.shape) for n, w in arrays.items()})
        for name, w in arrays.items():
            self[name][...] = w

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


def are_flat(grads: dict[str, Array], *buffers: dict[str, Array]) -> bool:
    """Return whether all are Flat and in one order, which ends with those that have gradients."""
    first = buffers[0]
    if not all(isinstance(buffer, Flat) and buffer.order == first.order for buffer in buffers):
        return False
    return grads.keys() == set(first.order[len(first) - len(grads) :])
