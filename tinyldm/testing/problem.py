"""A function under test with its backward pass, whatever form both have, in one form."""

import copy
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyldm.testing.nested import is_floating, leaves, like, replaced, to_numpy

__tracebackhide__ = True  # pytest shows the source of the caller, not this
WRAPPING = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}


class GradientError(AssertionError):
    """A gradient is missing, misshapen or wrong; the message names the tensor and the cause."""

    def __init__(self, message: str):
        lines = message.splitlines()
        super().__init__("\n".join(textwrap.fill(line, 79, **WRAPPING) for line in lines))


Values = dict[str, np.ndarray]  # path of a tensor → its values


class Problem:
    """Problem of a gradient check: `f` at one point, with all its arrays as those of NumPy.

    tensors: {path: floating array} of all inputs and parameters, in `dtype`.
    """

    def __init__(
        self,
        f: Callable,
        inputs: Any,
        params: dict | None,
        vjp: Callable | None,
        dtype: str = "float64",
    ):
        if vjp is not None and params is not None:
            raise ValueError("check_gradients: with vjp, give the parameters among the inputs")
        self.f, self.vjp, self.params, self.dtype = f, vjp, params, dtype
        self.several = isinstance(inputs, (tuple, list))
        self.inputs = list(inputs) if self.several else [inputs]
        self.of_params = dict(params or {})
        names = _names(f, len(self.inputs), params is not None)
        self.names = [f"input {name}" if name in self.of_params else name for name in names]
        self.places = {}  # path → the floating leaf as it was given
        for name, x in zip(self.names, self.inputs, strict=True):
            self.places |= leaves(x, name)
        self.places |= self.of_params
        self.places = {path: x for path, x in self.places.items() if is_floating(x)}
        self.tensors = {path: to_numpy(x).astype(dtype) for path, x in self.places.items()}
        self.made = {}  # path → what f was given in the last call

    def at(self, values: Values) -> "Problem":
        """Return the same problem at another point."""
        other = copy.copy(self)
        other.tensors = values
        return other

    def integers(self) -> dict[str, int]:
        """Return the inputs that are integers, by name."""
        pairs = zip(self.names, self.inputs, strict=True)
        return {name: int(x) for name, x in pairs if isinstance(x, (int, np.integer))}

    def place(self, path: str, values: np.ndarray) -> Any:
        """Make what f is given for a tensor: an array of its library, or a number."""
        return like(self.places[path], values)

    def given(self, values: Values) -> tuple[list, dict]:
        """Return inputs and parameters with these values in place of the tensors."""
        made = self.made = {path: self.place(path, x) for path, x in values.items()}
        inputs = [replaced(x, made, name) for name, x in zip(self.names, self.inputs, strict=True)]
        return inputs, {name: made.get(name, x) for name, x in self.of_params.items()}

    def call(self, values: Values) -> tuple[Any, Callable]:
        """Call f → y as it returned it, and backward(dy, grads) → gradients by path."""
        inputs, params = self.given(values)
        arguments = inputs if self.params is None else [params, *inputs]
        if self.vjp is not None:
            y = self.f(*arguments)

            def backward(dy, grads):
                return self.vjp(inputs if self.several else inputs[0], dy)

        else:
            y, back = _pair(self.f(*arguments))

            def backward(dy, grads):
                return back(dy) if self.params is None else back(dy, grads)

        return y, lambda dy, grads: self._by_path(backward(dy, grads), grads)

    def outputs(self, y: Any) -> Values:
        """Take the result apart → {path: array} of its floating or complex leaves."""
        found = {}
        for path, leaf in leaves(y, "y").items():
            if isinstance(leaf, (float, complex, np.generic)) or hasattr(leaf, "dtype"):
                leaf = to_numpy(leaf)
                if leaf.dtype.kind in "fc":
                    found[path] = leaf
        return found

    def derivatives_of(self, y: Any, values: Values, dtype: str | None = None) -> Any:
        """Put `values` in place of the floating leaves of y, None in that of the others."""
        at = leaves(y, "y")
        made = {
            path: like(at[path], x.astype(dtype or self.dtype, copy=False))
            for path, x in values.items()
        }
        return replaced(y, made, "y", other=None)

    def _by_path(self, returned, grads):
        """Pair the gradients that were returned, and those in `grads`, with the tensors."""
        found = {}
        floating = [
            (name, x)
            for name, x in zip(self.names, self.inputs, strict=True)
            if any(path in self.places for path in leaves(x, name))
        ]
        nested = len(self.inputs) == 1 and isinstance(self.inputs[0], (tuple, list))
        if returned is None:
            returned = ()
        elif not isinstance(returned, (tuple, list)) or (nested and len(returned) != 1):
            returned = (returned,)
        present = [dx for dx in returned if dx is not None]
        if len(returned) == len(self.inputs):
            pairs = list(zip(self.names, returned, strict=True))
        elif len(present) == len(floating):
            pairs = [(name, dx) for (name, _), dx in zip(floating, present, strict=True)]
        else:
            names = ", ".join(name for name, _ in floating) or "none"
            raise GradientError(
                f"inputs: expected {len(floating)} gradients ({names}), backward returned "
                f"{len(returned)}"
            )
        for name, dx in pairs:
            found |= {path: leaf for path, leaf in leaves(dx, name).items() if leaf is not None}
        for name, dx in grads.items():
            found[name] = dx
        return {path: to_numpy(dx) for path, dx in found.items()}


@dataclass
class Check:
    """One check: the problem, what the forward and the backward pass gave, and how to compare."""

    problem: Problem
    base: Values  # the outputs
    dy: Values
    grads: Values
    tol: float | None
    method: str

    @functools.cached_property
    def largest(self) -> float:
        """Sum of the sizes of all entries, of the gradients or of dy · y, where it is largest."""
        arrays = [*self.grads.values(), *(self.dy[path] * y for path, y in self.base.items())]
        return max(float(abs(x).sum()) for x in arrays)


def _pair(result):
    if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
        raise TypeError(
            "check_gradients: expected f to return (y, backward), or vjp=... for a plain function; "
            f"found {type(result).__name__}"
        )
    return result


def _names(f, count, layer):
    """Name the arguments as the function does, or by their positions."""
    try:
        parameters = list(inspect.signature(f).parameters.values())[1 if layer else 0 :]
    except (TypeError, ValueError):
        parameters = []
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [known[i] if i < len(known) else f"input {i}" for i in range(count)]
