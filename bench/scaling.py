"""How time and memory grow with the size of what is done."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from bench.compare import Rows, Run, milliseconds, our_step
from bench.measure import Step, apart, interleaved, leave, resident_memory
from bench.nets import UNetStep
from tinyldm.nn.attention import attention

BASE = UNetStep((32, 64), layers=1, side=16, samples=4, context=(16, 64))
BATCHES = (4, 8, 16, 32, 64)
SIDES = (8, 16, 32, 64)
CHANNELS = (32, 64, 128, 256)
TOKENS = (256, 1024, 4096)
FEATURES, HEADS = 320, 8  # of the attention
ROUNDS = 3


def table(run: Run) -> Rows:
    """Growth

    Forward and backward of a U-Net (32, 64), 16×16×4, batch 4, where one of these numbers changes,
    and of attention alone, 320 features in 8 heads. MB: what two such steps add to the memory of a
    process of its own. Exponents: of this size in time and memory, from the row above to this one.
    """
    unets = {
        "U-Net, batch": {n: replace(BASE, samples=n) for n in BATCHES},
        "U-Net, side": {side: replace(BASE, side=side) for side in SIDES},
        "U-Net, channels": {c: replace(BASE, widths=(c, 2 * c)) for c in CHANNELS},
    }
    for name, cases in unets.items():
        yield from series(name, our_step, cases, run)
    yield from series("attention, tokens", attention_step, {l: l for l in TOKENS}, run)


def attention_step(tokens: int) -> Step:
    """Forward and backward of one sample."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.standard_normal((1, tokens, FEATURES), np.float32) for _ in range(4))

    def step():
        y, backward = attention(q, k, v, HEADS)
        return y, backward(dy)

    return step


def series(name: str, prepare: Callable[..., Step], points: dict[int, Any], run: Run) -> Rows:
    """points: {size: what `prepare` makes a step of}, of which a tiny run takes the first two."""
    sizes = list(points)[: 2 if run.tiny else None]
    times = interleaved([prepare(points[size]) for size in sizes], min(run.rounds, ROUNDS))
    held = [apart(resident_memory, prepare, points[size]) for size in sizes]
    memory = [most - before for before, most in held]
    leave()
    seconds = np.median(times, axis=1)
    for i, size in enumerate(sizes):

        def exponent(values, i=i):
            return math.log(values[i] / values[i - 1]) / math.log(sizes[i] / sizes[i - 1])

        yield {
            "what grows": name,
            "size": str(size),
            "ms": milliseconds(times[i]),
            "MB": f"{memory[i] / 1e6:.3g}",
            "exponent, time": f"{exponent(seconds):.2f}" if i else "",
            "exponent, memory": f"{exponent(memory):.2f}" if i else "",
        }
