"""The functions between the convolutions, one typical shape each."""

from functools import partial

import numpy as np

from bench.compare import Rows, Run, ratio_columns
from bench.function import Function, measured
from tinyldm.nn.activations import geglu
from tinyldm.nn.attention import attention
from tinyldm.nn.norms import group_norm_silu, layer_norm

GROUPS, HEADS, EPS = 32, 8, 1e-5


def table(run: Run) -> Rows:
    """Functions, forward and backward

    The batch is split over the cores. ns: time for each number of the input. Copies: how often the
    input could have been copied in that time.
    """
    sizes = (2, 4, 32) if run.tiny else (16, 16, 256)
    for i in range(len(functions(*sizes))):
        function = function_at(i, *sizes)
        (own,), theirs, error = measured([function], run, backward=True)
        x = function.batch[0]
        columns = {
            "function": function.name,
            "input": "×".join(map(str, x.shape)),
            "tinyldm ns": nanoseconds(own, x),
        }
        if theirs:
            ratios, best = ratio_columns(own, theirs)
            columns |= {"PyTorch ns": nanoseconds(theirs[best], x)} | ratios
            columns["error"] = f"{error:.0e}"
        copies = np.median(own) * run.limits.bandwidth / (2 * x.nbytes)
        yield columns | {"copies": f"{copies:.1f}"}


def nanoseconds(times: np.ndarray, x: np.ndarray) -> str:
    """The median for each number of x."""
    return f"{1e9 * np.median(times) / x.size:.2f}"


def function_at(i: int, *sizes: int) -> Function:
    """One of `functions`."""
    return functions(*sizes)[i]


def functions(n: int, side: int, c: int) -> list[Function]:
    """As they are met at a level of a U-Net with c channels, in a batch of n."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    def made(i):
        return function_at, i, n, side, c

    w, b = 1 + normal(c) / 4, normal(c) / 4
    image, tokens = (n, side, side, c), (n, side * side, c)
    return [
        Function(
            "group norm + SiLU",
            partial(group_norm_silu, groups=GROUPS, eps=EPS),
            lambda torch, x, w, b: torch.silu(torch.group_norm(x, GROUPS, w, b, EPS)),
            (normal(*image),), (w, b), normal(*image), made(0), ("contiguous", "channels_last"),
        ),
        Function(
            "layer norm",
            partial(layer_norm, eps=EPS),
            lambda torch, x, w, b: torch.layer_norm(x, x.shape[-1:], w, b, EPS),
            (normal(*tokens),), (w, b), normal(*tokens), made(1),
        ),
        Function(
            "GEGLU", geglu, _geglu,
            (normal(*tokens[:2], 8 * c),), (), normal(*tokens[:2], 4 * c), made(2),
        ),
        Function(
            f"attention, {HEADS} heads", partial(attention, heads=HEADS), _attention,
            tuple(normal(*tokens) for _ in range(3)), (), normal(*tokens), made(3),
        ),
    ]  # fmt: skip


def _geglu(torch, x):
    value, gate = x.chunk(2, -1)
    return value * torch.gelu(gate)


def _attention(torch, *arrays):
    heads = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in arrays)
    return torch.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
