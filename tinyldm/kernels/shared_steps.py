"""Sampling steps shared between the cores, with cached results of the condition.

On any device; the twin of `sampling.pipeline.predictor`.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.cached import fixed
from tinyldm.kernels.cpu.processes import available, worker_pool
from tinyldm.kernels.registry import any_device, kernel
from tinyldm.threads import cores, map_threads, spans


@kernel("sampling.pipeline.predictor", cost=any_device)
@contextlib.contextmanager
def predictor(
    network: Callable[[Array, Array, Any], Array], condition: Array, at_once: int
) -> Iterator[Callable[[Array, float], Array]]:
    """Cut the batch: `at_once` samples on a core; processes share them where a fork is safe."""
    n, on_cpu, xp = len(condition), on_host(condition), array_module(condition)
    processes = available() if on_cpu else 1
    workers = min(n, processes if processes > 1 else cores() if on_cpu else 1)
    count = min(n, -(-n // (at_once * workers)) * workers)
    shares = spans(n, count)
    conditions = [condition[span] for span in shares]

    def part(i, x, t):
        return network(x, xp.full(len(x), t), conditions[i])

    with contextlib.ExitStack() as stack:
        stack.enter_context(fixed(*conditions))
        if processes > 1 and workers > 1:
            share = stack.enter_context(worker_pool(part, workers))
        elif on_cpu:
            share = partial(map_threads, lambda item: part(*item))
        else:
            share = partial(map, lambda item: part(*item))

        def predict(x, t):
            work = [(i, x[span], t) for i, span in enumerate(shares)]
            rounds = [work[i : i + workers] for i in range(0, count, workers)]
            return xp.concatenate([y for some in rounds for y in share(some)])

        yield predict
