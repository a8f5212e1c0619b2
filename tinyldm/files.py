"""Files that are written whole or not at all, and JSON with errors in one line."""

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from tinyldm.config import ConfigError

LONGEST_JSON = 2**26  # bytes; the largest are vocabularies and lists of shards


class replacing:
    """Replace a file at the end of a block: `with replacing(file) as temporary:` write `temporary`.

    After the block either the old file or the whole new one is there, even if the power fails.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)

    def __enter__(self) -> Path:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.file.name}-", dir=self.file.parent)
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind, error, _):
        try:
            if kind is not None:
                if isinstance(error, OSError) and error.filename is None:
                    if error.errno is None:  # has nothing but a message, as Pillow's have
                        error.args = (f"{self.file}: {error}",)
                    else:  # as of a full disk
                        error.filename = str(self.file)
                return
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(self.temporary, 0o666 & ~umask)
            _sync(self.temporary)
            os.replace(self.temporary, self.file)
        finally:
            self.temporary.unlink(missing_ok=True)
        if hasattr(os, "O_DIRECTORY"):
            _sync(self.file.parent)


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shown(text: object) -> str:
    """Return text in one line that any terminal can show: what cannot be printed is escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)
    )


def some(names: list[str]) -> str:
    """List names for a message: five of them, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more


def is_regular(file: Path) -> bool:
    """Return whether this is a file of bytes: no folder, device or pipe, which may never end."""
    return stat.S_ISREG(file.stat().st_mode)


def read_json(file: Path) -> dict:
    """Read the JSON object in a file. Raises FileNotFoundError or ConfigError, in one line."""
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: missing; expected the folder of a trained run, or of a Stable Diffusion model"
        )
    if not is_regular(file):
        raise ConfigError(f"{shown(file)}: expected a file of JSON, found something else")
    if file.stat().st_size > LONGEST_JSON:
        raise ConfigError(f"{shown(file)}: expected at most {LONGEST_JSON:,} bytes of JSON")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown(file)}: not valid JSON: {shown(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def without_doubles(pairs: list[tuple[str, Any]]) -> dict:
    """Make the dict of a JSON object; ValueError where a key occurs twice."""
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the key {name!r:.60} occurs twice")
        content[name] = value
    return content


def write_json(file: str | Path, content: Any) -> None:
    """Write `content` as JSON, with its keys in order, whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
