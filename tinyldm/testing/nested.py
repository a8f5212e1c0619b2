"""Nested values: arrays and numbers in tuples, lists and dicts; and arrays of other libraries."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np


def leaves(tree: Any, name: str) -> dict[str, Any]:
    """Take a nested value apart → {path: leaf}: name[0], name['key'], in order."""
    if isinstance(tree, Mapping):
        parts = [(f"{name}[{key!r}]", part) for key, part in tree.items()]
    elif isinstance(tree, (tuple, list)):
        parts = [(f"{name}[{i}]", part) for i, part in enumerate(tree)]
    else:
        return {name: tree}
    found = {}
    for path, part in parts:
        found |= leaves(part, path)
    return found


def replaced(tree: Any, leaf_at: dict[str, Any], name: str, other: Any = ...) -> Any:
    """Put leaves into a copy of a nested value; the others stay, or all become `other`."""
    if isinstance(tree, Mapping):
        return {
            key: replaced(part, leaf_at, f"{name}[{key!r}]", other) for key, part in tree.items()
        }
    if isinstance(tree, (tuple, list)):
        parts = [replaced(part, leaf_at, f"{name}[{i}]", other) for i, part in enumerate(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return leaf_at.get(name, tree if other is ... else other)


def is_floating(x: Any) -> bool:
    """Return whether a leaf is a real floating number or an array of them, of any library."""
    if isinstance(x, (bool, int, str, bytes, type(None))):
        return False
    if isinstance(x, float):
        return True
    return hasattr(x, "dtype") and hasattr(x, "shape") and to_numpy(x).dtype.kind == "f"


def to_numpy(x: Any) -> np.ndarray:
    """Copy an array or number of any library to one of NumPy, if need be."""
    if hasattr(x, "get") and not isinstance(x, np.ndarray):  # CuPy
        return x.get()
    if hasattr(x, "detach"):  # PyTorch
        x = x.detach().cpu()
        x = x.resolve_conj() if hasattr(x, "resolve_conj") else x
    return np.asarray(x)


def like(x: Any, values: np.ndarray) -> Any:
    """Make a number or an array, of the library and on the device of `x`, with these values."""
    if isinstance(x, (float, complex)) and not isinstance(x, np.generic):
        return values.item()
    if isinstance(x, (np.ndarray, np.generic)):
        return values if isinstance(x, np.ndarray) else values[()]
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__().asarray(values)
    made = sys.modules[type(x).__module__.partition(".")[0]].asarray(values)
    return made.to(x.device) if hasattr(made, "to") else made
