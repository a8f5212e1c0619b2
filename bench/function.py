"""Single functions beside PyTorch, the batch split over the cores as in training."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np

from bench.compare import Run, check
from bench.measure import Elsewhere, Step, entered, interleaved, leave
from tinyldm.backend import Array
from tinyldm.kernels.cpu.processes import WorkerPool, worker_pool
from tinyldm.nn import no_grad
from tinyldm.threads import cores, map_threads


@dataclass(frozen=True)
class Function:
    """`ours(*batch, *weights) → (y, backward)`, `theirs(torch.nn.functional, …the same) → y`."""

    name: str
    ours: Callable
    theirs: Callable
    batch: tuple[Array, ...]
    weights: tuple[Array, ...]
    dy: Array
    made: tuple  # of (function, *its arguments), so that another process can make it too
    layouts: tuple[str, ...] = ("contiguous",)

    def step(self, backward: bool) -> tuple[Step, Step]:
        """Two that do the same: one → for each shard y or, with `backward`, y and all gradients.

        The other, to be timed, has a process for each shard.
        """

        def run(shard):
            *arrays, dy = shard
            if not backward:
                with no_grad():
                    return self.ours(*arrays, *self.weights)[:1]
            y, back = self.ours(*arrays, *self.weights)
            gradients = back(dy)
            return y, *(gradients if isinstance(gradients, tuple) else (gradients,))

        count = min(cores(), len(self.dy))
        cut = [np.array_split(array, count) for array in (*self.batch, self.dy)]
        shards = list(zip(*cut, strict=True))

        def repeat(i, repeats):
            for _ in range(repeats):
                run(shards[i])

        return partial(map_threads, run, shards), Shared(entered(worker_pool(repeat, count)), count)

    def their_step(self, peer: ModuleType, layout: str, backward: bool) -> Step:
        """→ y or, with `backward`, y and all gradients."""
        *batch, dy = (peer.tensor(x, layout) for x in (*self.batch, self.dy))
        leaves = [*batch, *(peer.tensor(w, layout, axes=peer.KERNEL) for w in self.weights)]
        function = partial(self.theirs, peer.functional)
        if backward:
            return peer.forward_backward(function, leaves, dy)
        return peer.without_grad(lambda: (function(*leaves),))

    def error(self, peer: ModuleType, shards: list[tuple], theirs: tuple) -> float:
        """The largest of all results, relative to the largest number in each."""
        last = len(self.batch)  # of the results that are a batch: y and its gradients
        errors = []
        for i, (parts, other) in enumerate(zip(zip(*shards, strict=True), theirs, strict=True)):
            own = np.concatenate(parts) if i <= last else sum(parts)
            other = peer.to_numpy(other, peer.IMAGE if i <= last else peer.KERNEL)
            errors.append(np.abs(own - other).max() / np.abs(other).max())
        return float(np.max(errors))  # not a number, if one of them is not


class Shared:
    """A step that processes share, each on its own: they meet before and after many calls of it."""

    def __init__(self, processes: WorkerPool, count: int):
        self.processes, self.count = processes, count

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, repeats: int) -> float:
        """Of a call."""
        start = time.perf_counter()
        self.processes([(i, repeats) for i in range(self.count)])
        return (time.perf_counter() - start) / repeats


def their_step(made: tuple, layout: str, backward: bool) -> Step:
    """Results are arrays, in PyTorch's order of axes."""
    from bench import peer

    make, *args = made
    step = make(*args).their_step(peer, layout, backward)
    return lambda: peer.to_arrays(step())


def measured(
    variants: list[Function], run: Run, backward: bool
) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """Times (variants, rounds), PyTorch's (rounds,) by layout, and the largest error.

    The variants differ in `ours` alone.
    """
    ours, timed = zip(*(variant.step(backward) for variant in variants), strict=True)
    first = variants[0]
    layouts = first.layouts if run.peer else ()
    theirs = [
        entered(Elsewhere(their_step, first.made, layout, backward, preload="bench.peer"))
        for layout in layouts
    ]
    error = 0.0
    for step in theirs:
        expected = step()
        error = float(np.max([error, *(first.error(run.peer, own(), expected) for own in ours)]))
    check(first.name, error)
    times = interleaved([*timed, *theirs], run.rounds)
    leave()
    return times[: len(ours)], dict(zip(layouts, times[len(ours) :], strict=True)), error
