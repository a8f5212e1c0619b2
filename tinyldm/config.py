"""Read the `config.json` of a component: diffusers' keys, diffusers' defaults, no surprises."""

import difflib
import sys
from collections.abc import Iterable
from types import NoneType, SimpleNamespace
from typing import Any, get_args, get_origin

Kind = Any  # a type: bool, int, float, str, None, a list of one of them, or a union of these

LARGEST = 2**24  # of integers in a config
LONGEST = 64  # of lists in a config
SHOWN = 60  # characters of a value in a message
KINDS: dict[str, Kind] = {  # of keys whose default does not show it
    "sample_size": int | list[int] | None,
    "mid_block_type": str | None,
    "down_block_types": list[str] | str,
    "up_block_types": list[str] | str,
    "layers_per_block": int | list[int],
    "attention_head_dim": int | list[int],
    "cross_attention_dim": int | list[int],
    "transformer_layers_per_block": int | list[int] | list[list[int]],
    "addition_embed_type": str | None,
    "num_class_embeds": int | None,
    "time_embedding_dim": int | None,
    "shift_factor": float | None,
    "vq_embed_dim": int | None,
}
MOST = {"layers_per_block": 64, "transformer_layers_per_block": 64, "num_hidden_layers": 256}
MAY_BE_0 = {"freq_shift", "layers_per_block", "num_hidden_layers", "shift_factor"}


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
        if key.startswith("_"):
            continue
        if key in defaults:
            kind = KINDS.get(key, _kind_of(defaults[key]))
            check_kind(what, key, value, kind, int(key not in MAY_BE_0), MOST.get(key, LARGEST))
        elif key in fixed:
            if value not in fixed[key]:
                wanted = " or ".join(repr(choice) for choice in fixed[key])
                raise ConfigError(
                    f"{what}: {key} = {brief(value)} is not implemented, only {wanted}"
                )
        elif not ignore_unknown:
            raise ConfigError(f"{what}: unknown key {brief(key)}{meant(key, [*defaults, *fixed])}")
    return SimpleNamespace(**{key: config.get(key, default) for key, default in defaults.items()})


def _kind_of(default):
    return list[type(default[0])] if isinstance(default, list) else type(default)


def check_kind(
    what: str, key: str, value: Any, kind: Kind, least: int = 0, most: int = LARGEST
) -> None:
    """Raise ConfigError, which begins with `what`, for a value of another kind.

    Integers are `least`…`most`; numbers are finite and, where `least` is not 0, above 0.
    """
    if _fits(value, kind, least, most):
        return
    bounds = f" of {least} to {most:,}" if int in (kind, *get_args(kind)) else ""
    raise ConfigError(f"{what}: {key}: expected {_described(kind)}{bounds}, found {brief(value)}")


def _fits(value, kind, least, most):
    if get_origin(kind) is list:
        entries = isinstance(value, (list, tuple)) and len(value) <= LONGEST
        return entries and all(_fits(entry, *get_args(kind), least, most) for entry in value)
    if get_args(kind):
        return any(_fits(value, each, least, most) for each in get_args(kind))
    if isinstance(value, bool) or kind not in (int, float):
        return type(value) is kind or kind is str and isinstance(value, str)
    if kind is int:
        return isinstance(value, int) and least <= value <= most
    above = isinstance(value, (int, float)) and (value > 0 or least == 0)
    return above and abs(value) <= sys.float_info.max


def _described(kind):
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}
    words |= {NoneType: "null", dict: "an object"}
    if get_origin(kind) is list:
        return f"a list of {_described(*get_args(kind)).removeprefix('a ').removeprefix('an ')}s"
    if get_args(kind):
        return " or ".join(map(_described, get_args(kind)))
    return words.get(kind) or f"a {kind.__name__}"


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
    return f"expected {', '.join(first)} or {last}, found {brief(word)}{meant(word, known)}"


def meant(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'd'?" where a known word is near, else an empty string."""
    close = difflib.get_close_matches(word, known, 1) if isinstance(word, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def brief(value: object) -> str:
    """Return the repr of a value in one line, cut off where it is long."""
    try:
        text = repr(value).replace("\n", " ")
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists within lists
        return f"a long {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
