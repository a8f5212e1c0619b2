"""Classes in place of texts: names of classes to numbers, and a number to a token of its own.

Rombach et al. 2022, section 3.3: a U-Net attends to the token of the class as it would to a text.
Where a U-Net has an embedding of classes itself, beside its time step (Dhariwal & Nichol 2021), the
numbers are all that it needs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from tinyldm.backend import Array
from tinyldm.config import meant, read_config
from tinyldm.files import read_json, write_json
from tinyldm.nn.layers import Embedding, Layer
from tinyldm.nn.protocol import Backward, Params

DEFAULTS = {"num_classes": 1001, "hidden_size": 512}  # as for ImageNet, and none of them
FILE = "classes.json"
MOST_NAMED = 12  # classes, in a message


class ClassNames:
    """The number of each class, in place of a tokenizer; "" is the class of what has none.

    That one comes last. It is what guidance leads away from. ValueError for names that are no
    texts, or not different.
    """

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
        """int64 (n,); a string is a list of one. ValueError for a name that is none of them."""
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
        """What it is made from."""
        return {"names": self.names}

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The inverse of `save`. ValueError for a file of anything else."""
        file = Path(folder) / FILE
        names = read_json(file).get("names")
        try:
            return cls(names)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write classes.json."""
        write_json(Path(folder) / FILE, self.content)


class ClassEmbedder(Layer):
    """class_embedder(params, labels (n,)) → the token of each class (n, 1, d), and backward.

    config: num_classes, the one of what has none included, and hidden_size, d.
    """

    def __init__(self, config: dict):
        self.config = c = read_config("text_encoder config", config, DEFAULTS, {})
        self.embedding = Embedding("embedding", c.num_classes, c.hidden_size, std=1.0)

    def __call__(self, params: Params, labels: Array) -> tuple[Array, Backward]:
        """backward(dy, grads) → None: labels have no gradient. ValueError for other labels."""
        if labels.ndim != 1:
            raise ValueError(f"class_embedder: expected labels (n,), found {labels.shape}")
        y, embedding_back = self.embedding(params, labels)

        def backward(dy, grads):
            embedding_back(dy[:, 0], grads)

        return y[:, None], backward
