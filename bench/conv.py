"""The convolution, where most of the time goes: its rate, and that of each of its algorithms."""

import math
from dataclasses import replace

import numpy as np

from bench.compare import Row, Rows, Run, ratio_columns
from bench.function import Function, measured
from tinyldm.nn.conv import conv2d
from tinyldm.nn.protocol import KERNELS
from tinyldm.threads import cores

SHAPES = (  # n, c, side
    (32, 64, 32), (32, 64, 16), (32, 64, 8), (32, 128, 16), (32, 128, 8), (32, 256, 16),
    (32, 256, 8), (2, 320, 64), (2, 640, 32), (2, 1280, 16),
)  # fmt: skip
TINY = ((2, 32, 8), (4, 8, 4))


def table(run: Run) -> Rows:
    """3×3 convolutions

    To as many channels as the input (n×h×w×c) has, the batch split over the cores. In GF/s, where
    a direct convolution counts: 18 n h w c² operations forward, three times as many with both ways
    back. The last columns are the kernels that tinyldm chooses from.
    """
    for n, c, side in TINY if run.tiny else SHAPES:
        function = convolution(n, c, side)
        for backward in (False, True):
            operations = (3 if backward else 1) * 18 * n * side**2 * c**2
            yield row(function, run, backward, operations)


def convolution(n: int, c: int, side: int) -> Function:
    """Of random numbers."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((n, side, side, c), np.float32) for _ in range(2))
    w = rng.standard_normal((3, 3, c, c), np.float32) / np.float32(3 * c**0.5)
    b = rng.standard_normal(c, np.float32)

    def theirs(torch, x, w, b):
        return torch.conv2d(x, w, b, padding=1)

    name = f"{n}×{side}×{side}×{c}"
    made = (convolution, n, c, side)
    return Function(name, conv2d, theirs, (x,), (w, b), dy, made, ("contiguous", "channels_last"))


def row(function: Function, run: Run, backward: bool, operations: int) -> Row:
    """One direction."""
    n = len(function.dy)
    x, w = function.batch[0][: n // min(cores(), n)], function.weights[0]  # of a shard
    costs = [(kernel.cost(x, w), kernel) for kernel in KERNELS["tinyldm.nn.conv.conv2d"]]
    able = sorted((one for one in costs if one[0] < math.inf), key=lambda one: one[0])
    names = [kernel.function.__name__ for _, kernel in able]
    variants = [replace(function, ours=kernel.function) for _, kernel in able]
    own, theirs, error = measured(variants, run, backward)

    def rate(times):
        return f"{operations / np.median(times) / 1e9:.0f}"

    columns = {
        "input": f"{function.name}, {'forward + backward' if backward else 'forward'}",
        "tinyldm": rate(own[0]),
        "of SGEMM": f"{operations / np.median(own[0]) / run.limits.flops:.0%}",
    }
    if theirs:
        ratios, best = ratio_columns(own[0], theirs)
        columns |= {"PyTorch": rate(theirs[best])} | ratios | {"error": f"{error:.0e}"}
    by_name = dict(zip(names, own, strict=True))
    return columns | {name: rate(by_name[name]) for name in sorted(by_name)}
