"""Options: dataclass fields that say their help, range and choices once.

The command line, error messages and the notes in a PNG are derived from them.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable
from numbers import Integral, Real

from tinyldm.config import unknown


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
    """Return the type of an option, such as float, and whether it may be None too."""
    kinds = typing.get_args(field.type) or (field.type,)
    return kinds[0], type(None) in kinds


def check_options(instance: object, error: type[ValueError] = ValueError) -> None:
    """Raise `error`, in one line, for the first option of a dataclass that is not as expected."""
    for name, field in options_of(type(instance)).items():
        value, (kind, may_be_none) = getattr(instance, name), kind_of(field)
        if value is None and may_be_none:
            continue
        choices = field.metadata["choices"]
        if choices is not None:
            if value not in choices:
                raise error(f"{name}: {unknown(value, choices)}")
        elif kind is int and not isinstance(value, Integral):
            raise error(f"{name}: expected an integer, found {value!r}")
        elif kind is float and not isinstance(value, Real):
            raise error(f"{name}: expected a number, found {value!r}")
        if kind in (int, float) and choices is None:
            least, most = field.metadata["least"], field.metadata["most"]
            if not in_range(value, least, most):
                raise error(f"{name}: expected {range_text(least, most)}, found {value}")
            if not math.isfinite(value):
                raise error(f"{name}: expected a finite number, found {value}")


def in_range(value: float, least: float | None, most: float | None) -> bool:
    """Return whether a number is not below `least` and not above `most`."""
    return (least is None or value >= least) and (most is None or value <= most)


def range_text(least: float | None, most: float | None) -> str:
    """Name a range: "1 or more", "0…1"."""
    return f"{least:g} or more" if most is None else f"{least:g}…{most:g}"
