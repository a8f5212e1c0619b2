"""Random arrays of shapes that are written as text: `tensors_of("n d", "d", n=3, d=2, seed=0)`."""

import re

import numpy as np


class Tensors(list):
    """A list of arrays that prints as the call which makes it."""

    call, seed = "", 0

    def __repr__(self) -> str:
        return self.call


def tensors_of(*shapes: str, seed: int = 0, **sizes: int) -> Tensors:
    """Make arrays of these shapes: normal numbers about 0.3, without a symmetry that hides faults.

    shapes: sizes with spaces between them, each a name, a number or a product: "n h w 3", "g*k".
    sizes: of the names. ValueError where one is missing.
    """
    rng = np.random.default_rng(seed)
    made = Tensors(rng.normal(0.3, 1, _shape(shape, sizes)) for shape in shapes)
    made.seed = seed
    words = [repr(shape) for shape in shapes]
    words += [f"{name}={size}" for name, size in sizes.items()]
    made.call = f"tensors_of({', '.join([*words, f'seed={seed}'])})"
    return made


def letters(*shapes: str) -> list[str]:
    """List the names of the sizes in these shapes, each once."""
    return list(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", " ".join(shapes))))


def _shape(text, sizes):
    shape = []
    for product in text.split():
        factors = product.split("*")
        for name in factors:
            if not name.isdigit() and name not in sizes:
                raise ValueError(f"shape {text!r}: no size is given for {name!r}")
        shape.append(int(np.prod([int(f) if f.isdigit() else sizes[f] for f in factors])))
    return tuple(shape)
