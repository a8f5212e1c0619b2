"""Options: dataclass fields that say their help, range and choices once.

The command line, error messages and the notes in a PNG are derived from them.
"""

import dataclasses
import sys
import typing
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path

from tinyldm.config import brief, unknown


def option(
    help: str,
    default: object = dataclasses.MISSING,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: Iterable | None = None,
    group: str | None = None,
    metavar: str | None = None,
    default_text: str | None = None,
) -> typing.Any:
    """Make a dataclass field that is an option.

    help: a phrase that can be read alone. default: as for a dataclass field. least, most: of a
    number, both allowed. choices: the words or integers that it may be. group: the heading under
    which the command line lists it. metavar: what the command line calls its value. default_text:
    what the command line says of its default, where that is not `default` itself.
    """
    if choices is not None:
        choices = tuple(choices)
    metadata = {
        "help": help, "least": least, "most": most, "choices": choices, "group": group,
        "metavar": metavar, "default_text": default_text,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def options_of(cls: type) -> dict[str, dataclasses.Field]:
    """Return {name: field} of the options among the fields of a dataclass."""
    return {field.name: field for field in dataclasses.fields(cls) if "help" in field.metadata}


def kind_of(field: dataclasses.Field) -> tuple[type, bool]:
    """Return the type of an option, `object` where it may have several, and if it may be None."""
    kinds = typing.get_args(field.type) or (field.type,)
    kind, *others = (kind for kind in kinds if kind is not type(None))
    return object if others else kind, type(None) in kinds


def check_options(instance: object, error: type[ValueError] = ValueError) -> None:
    """Raise `error`, in one line, for the first option of a dataclass that is not as expected."""
    for name, field in options_of(type(instance)).items():
        if found := problem(field, getattr(instance, name)):
            raise error(f"{name}: {found}")


def problem(field: dataclasses.Field, value: object) -> str:
    """Return what an option expects and what `value` is instead; "" where it is as expected."""
    kind, may_be_none = kind_of(field)
    least, most, choices = (field.metadata[key] for key in ("least", "most", "choices"))
    if value is None and may_be_none:
        return ""
    if choices is not None:
        word = value if isinstance(value, str) else brief(value)
        return "" if value in choices else unknown(word, list(map(str, choices)))
    if kind is object:  # one integer or two
        sides = value if isinstance(value, (list, tuple)) else [value]
        whole = len(sides) in (1, 2) and all(isinstance(side, Integral) for side in sides)
        return "" if whole else f"expected an integer, or two, found {brief(value)}"
    if kind not in (int, float):
        wanted = "true or false" if kind is bool else "a text"
        return "" if isinstance(value, kind) else f"expected {wanted}, found {brief(value)}"
    if (
        isinstance(value, Integral if kind is int else Real)
        and abs(value) <= sys.float_info.max
        and (least is None or value >= least)
        and (most is None or value <= most)
    ):
        return ""
    wanted = "an integer" if kind is int else "a number"
    if least is not None:
        wanted += f" ≥ {least}" if most is None else f" {least}…{most}"
    return f"expected {wanted}, found {brief(value)}"


def path_of(name: str, given: object) -> Path:
    """Return the path that a caller gives. ValueError for "", as of a variable that is not set."""
    try:
        path = Path(given)
    except TypeError:
        path = None
    if path is None or given == "":
        raise ValueError(f"{name}: expected the name of a file or folder, found {brief(given)}")
    return path
