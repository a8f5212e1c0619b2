"""Strategies of hypothesis for tests of gradients: sizes that fit together, and a seed.

    @given(inputs=tensors("n d", "d k", "k"))
    def test_linear(inputs):
        check_gradients(linear, inputs)

Each letter is a size, the same wherever it stands, so the shapes fit by construction and no example
is thrown away. The numbers come from a generator with the drawn seed, so examples are fast to draw
and shrink to a line of small whole numbers, which can be pasted: `tensors_of("n d", n=1, d=2,
seed=0)`. Needs hypothesis.
"""

import re
from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


class Tensors(list):
    """A list of arrays that prints as the call which makes it."""

    call = ""

    def __repr__(self) -> str:
        return self.call


def tensors_of(*shapes: str, seed: int = 0, **sizes: int) -> Tensors:
    """Make arrays of these shapes: normal numbers about 0.3, without a symmetry that hides faults.

    shapes: sizes with spaces between them, each a name, a number or a product: "n h w 3", "g*k".
    sizes: of the names. ValueError where one is missing.
    """
    rng = np.random.default_rng(seed)
    made = Tensors(rng.normal(0.3, 1, _shape(shape, sizes)) for shape in shapes)
    words = [repr(shape) for shape in shapes]
    words += [f"{name}={size}" for name, size in sizes.items()]
    made.call = f"tensors_of({', '.join([*words, f'seed={seed}'])})"
    return made


def _shape(text, sizes):
    shape = []
    for product in text.split():
        factors = product.split("*")
        for name in factors:
            if not name.isdigit() and name not in sizes:
                raise ValueError(f"shape {text!r}: no size is given for {name!r}")
        shape.append(int(np.prod([int(f) if f.isdigit() else sizes[f] for f in factors])))
    return tuple(shape)


@st.composite
def tensors(
    draw: st.DrawFn,
    *shapes: str,
    sizes: Mapping[str, st.SearchStrategy[int]] | None = None,
    largest: int = 4,
) -> Tensors:
    """Draw arrays whose shapes fit together, from sizes 1…largest and a seed.

    shapes: see `tensors_of`. sizes: what a name is drawn from, where it is another range, as
    `{"k": st.sampled_from([1, 3])}`.
    """
    names = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", " ".join(shapes)))
    drawn = {name: draw((sizes or {}).get(name, st.integers(1, largest))) for name in names}
    return tensors_of(*shapes, seed=draw(SEEDS), **drawn)
