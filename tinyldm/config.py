"""Read the `config.json` of a component: diffusers' keys, diffusers' defaults, no surprises."""

import difflib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any


class ConfigError(ValueError):
    """A configuration asks for something that is not implemented or does not fit together."""


def read_config(
    what: str, config: dict, defaults: dict, fixed: dict[str, list], ignore_unknown: bool = False
) -> SimpleNamespace:
    """Fill in missing keys with their defaults and refuse what is not implemented.

    defaults: {key: diffusers' default} of the keys that are used.
    fixed: {key: the values that are implemented}, the first being diffusers' default.
    Keys with a leading underscore are notes of diffusers. Returns an object with all of `defaults`
    as attributes. Raises ConfigError, which begins with `what`.
    """
    for key, value in config.items():
        if key.startswith("_") or key in defaults:
            continue
        if key in fixed:
            if value not in fixed[key]:
                wanted = " or ".join(repr(choice) for choice in fixed[key])
                raise ConfigError(f"{what}: {key} = {value!r} is not implemented, only {wanted}")
        elif not ignore_unknown:
            raise ConfigError(f"{what}: unknown key {key!r}{meant(key, [*defaults, *fixed])}")
    return SimpleNamespace(**{key: config.get(key, default) for key, default in defaults.items()})


def per_block(what: str, key: str, value: Any, count: int) -> list:
    """Return a per-block setting, given once or once a block, as a list with one entry a block.

    Raises ConfigError, which begins with `what`, for a list of another length than `count`.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ConfigError(f"{what}: {key} has {len(values)} entries for {count} blocks")
    return values


def unknown(word: str, known: Iterable[str]) -> str:
    """Return "expected a, b or c, found 'd'", with the word that was probably meant."""
    *first, last = known
    return f"expected {', '.join(first)} or {last}, found {word!r}{meant(word, known)}"


def meant(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'd'?" where a known word is near, else an empty string."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""
