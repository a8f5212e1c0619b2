"""Strategies of hypothesis for tests of gradients: sizes that fit together, and a seed.

    @given(inputs=tensors("n d", "d k", "k"))
    def test_linear(inputs):
        check_gradients(linear, inputs)

Each letter is a size, the same wherever it stands, so the shapes fit by construction and no example
is thrown away. The numbers come from a generator with the drawn seed, so examples are fast to draw
and shrink to a line of small whole numbers, which can be pasted: `tensors_of("n d", n=1, d=2,
seed=0)`. Needs hypothesis.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tinyldm.testing.tensors import Tensors, letters, tensors_of

SEEDS = st.integers(0, 2**32 - 1)


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
    drawn = {
        name: draw((sizes or {}).get(name, st.integers(1, largest))) for name in letters(*shapes)
    }
    return tensors_of(*shapes, seed=draw(SEEDS), **drawn)


class Call(NamedTuple):
    """Arguments of one call: `f(*call.inputs, **call.options)`."""

    inputs: Tensors
    options: dict[str, Any]


@st.composite
def convolutions(
    draw: st.DrawFn,
    *shapes: str,
    kernels: st.SearchStrategy[int] = st.integers(1, 4),  # noqa: B008  strategies do not change
    strides: st.SearchStrategy[int] = st.integers(1, 3),  # noqa: B008
    paddings: st.SearchStrategy[int | tuple] = st.integers(0, 3),  # noqa: B008
) -> Call:
    """Draw an image, a kernel, a bias, and `stride` and `padding`, which give an image of ≥ 1 × 1.

    shapes: of what the function takes, in its order and its layout, in the letters n, h, w, i and
    o (channels in and out), kh and kw. By default "n h w i", "kh kw i o", "o".
    paddings: of all sides alike, or of (top, bottom, left, right).
    """
    padding = draw(paddings)
    top, bottom, left, right = (padding,) * 4 if isinstance(padding, int) else padding
    kh, kw = draw(kernels), draw(kernels)
    sizes = {
        "kh": st.just(kh),
        "kw": st.just(kw),
        "h": st.integers(0, 4).map(lambda more: max(1, kh - top - bottom) + more),
        "w": st.integers(0, 4).map(lambda more: max(1, kw - left - right) + more),
    }
    inputs = draw(tensors(*(shapes or ("n h w i", "kh kw i o", "o")), sizes=sizes))
    return Call(inputs, {"stride": draw(strides), "padding": padding})


@st.composite
def group_norms(draw: st.DrawFn, *shapes: str) -> Call:
    """Draw an input, a scale and a shift, and `groups`, which divide the channels c.

    shapes: as of `tensors_of`, the batch first; by default "n h w c", "c", "c". A group has three
    numbers or more: of two, normalising leaves nothing but the sign.
    """
    shapes = shapes or ("n h w c", "c", "c")
    places = {name: draw(st.integers(1, 4)) for name in letters(shapes[0])[1:] if name != "c"}
    fewest = -(-3 // math.prod(places.values()))
    groups = draw(st.integers(1, 4))
    c = groups * draw(st.integers(fewest, fewest + 2))
    sizes = {name: st.just(size) for name, size in (places | {"c": c}).items()}
    return Call(draw(tensors(*shapes, sizes=sizes)), {"groups": groups})


@st.composite
def attentions(draw: st.DrawFn, *shapes: str) -> Call:
    """Draw queries, keys and values, `heads`, which divide their widths, and `causal`.

    shapes: in the letters n, l queries, m keys, d and e features of keys and of values; by default
    "n l d", "n m d", "n m e".
    """
    heads = draw(st.integers(1, 3))
    sizes = dict.fromkeys("de", st.integers(1, 4).map(lambda each: heads * each))
    inputs = draw(tensors(*(shapes or ("n l d", "n m d", "n m e")), sizes=sizes))
    return Call(inputs, {"heads": heads, "causal": draw(st.booleans())})
