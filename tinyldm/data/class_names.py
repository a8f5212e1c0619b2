"""Class names as ids, in place of a tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from tinyldm.config import meant
from tinyldm.files import read_json, write_json

FILE = "classes.json"
MOST_NAMED = 12  # classes listed in an error message


class ClassNames:
    """Maps class names to ids 0…n − 1; the empty prompt is the unconditional class n.

    Classifier-free guidance leads away from that class. Raises ValueError for names that are not
    text, or not different.
    """

    FILES = (FILE,)  # that `save` writes

    def __init__(self, names: Sequence[str]):
        if not all(isinstance(name, str) and name for name in names) or not names:
            raise ValueError(f"classes: expected names, found {names!r}")
        self.names = list(names)
        self._ids = {name: i for i, name in enumerate([*names, ""])}
        if len(self._ids) != len(self):
            raise ValueError("classes: expected different names, found one of them twice")

    def __len__(self) -> int:
        return len(self.names) + 1

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Return the ids, int64 (n,); a string is a list of one. ValueError for an unknown name."""
        texts = [texts] if isinstance(texts, str) else texts
        for text in texts:
            if text not in self._ids:
                some = ", ".join(self.names[:MOST_NAMED]) + ", …" * (len(self) > MOST_NAMED + 1)
                raise ValueError(
                    f"prompt: expected a class of the model ({some}), or nothing, found {text!r}"
                    + meant(text, self.names)
                )
        return np.array([self._ids[text] for text in texts], np.int64)

    @property
    def content(self) -> dict:
        """Return the constructor's arguments, from which it can be rebuilt."""
        return {"names": self.names}

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. ValueError for any other file."""
        file = Path(folder) / FILE
        names = read_json(file).get("names")
        try:
            return cls(names)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write classes.json."""
        write_json(Path(folder) / FILE, self.content)
