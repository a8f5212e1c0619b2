"""Reading the `config.json` of a component: diffusers' keys, diffusers' defaults, no surprises."""

import difflib
from types import SimpleNamespace


class ConfigError(ValueError):
    """A configuration asks for something that is not implemented or does not fit together."""


def read_config(what, config, defaults, fixed, ignore_unknown=False):
    """Fill in what is missing and refuse what is not implemented.

    defaults: {key: diffusers' default} of the keys that are used.
    fixed: {key: the values that are implemented}, the first being diffusers' default.
    Keys with a leading underscore are notes of diffusers. Returns an object with all of `defaults`
    as attributes.
    """
    for key, value in config.items():
        if key.startswith("_") or key in defaults:
            continue
        if key in fixed:
            if value not in fixed[key]:
                wanted = " or ".join(repr(choice) for choice in fixed[key])
                raise ConfigError(f"{what}: {key} = {value!r} is not implemented, only {wanted}")
        elif not ignore_unknown:
            close = difflib.get_close_matches(key, [*defaults, *fixed], 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{what}: unknown key {key!r}{hint}")
    return SimpleNamespace(**{key: config.get(key, default) for key, default in defaults.items()})


def per_block(what, key, value, count):
    """A value that may be given once or once a block, as a list with one entry a block."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ConfigError(f"{what}: {key} has {len(values)} entries for {count} blocks")
    return values
