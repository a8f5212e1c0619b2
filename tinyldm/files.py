"""Files that are written whole or not at all, and JSON with errors in one line."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tinyldm.config import ConfigError


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

    def __exit__(self, kind, *_):
        try:
            if kind is not None:
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


def read_json(file: Path) -> dict:
    """Read the JSON object in a file. Raises FileNotFoundError or ConfigError, in one line."""
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: missing; expected the folder of a trained run, or of a Stable Diffusion model"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(file: str | Path, content: Any) -> None:
    """Write `content` as JSON, with its keys in order, whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
