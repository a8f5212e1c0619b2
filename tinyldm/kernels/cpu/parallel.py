"""The gradient of a batch, on all cores; the twin of `training.step.value_and_grad`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tinyldm.backend import Array, on_host
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.kernels.cpu.processes import available, worker_pool
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.nn.protocol import add_grad
from tinyldm.threads import cut_batch, free_cores, map_threads

Gradient = Callable[[tuple[Array, ...]], tuple[Array, dict[str, Array]]]  # batch → loss, gradients


def _on_cpu(loss_fn, params, batch, shards=None):
    return 0.0 if on_host(batch[0]) else NEVER


@kernel("training.step.value_and_grad", cost=_on_cpu)
def value_and_grad(
    loss_fn: Callable,
    params: dict[str, Array],
    batch: tuple[Array, ...],
    shards: int | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Cut the batch into `shards` (default: one a core), a thread each.

    Their results are weighted by length, so the cut matters only to the rounding.
    """
    shares = cut_batch(batch, shards or (free_cores() if on_host(batch[0]) else 1))
    return _sum(map_threads(lambda share: _weighted(loss_fn, params, *share), shares))


def _worth_processes(loss_fns, params, others, processes=None):
    shared = isinstance(params, Flat) and params.shared
    return 0.0 if shared and (processes or available()) > 1 else NEVER


@kernel("training.step.gradients", cost=_worth_processes)
@contextlib.contextmanager
def gradients(
    loss_fns: Sequence[Callable],
    params: Flat,
    others: Flat | dict,
    processes: int | None = None,
) -> Iterator[list[Gradient]]:
    """Share every batch with copies of this process, as many as are `available` by default.

    The result is the same to the last bit as with threads. The other processes see later changes of
    `params`, and of nothing else. Gradients under names that no parameter
    has must be small: they come back through a pipe.
    """
    named = params | others if others else params
    processes = processes or available()
    theirs = [Flat(named, shared=True) for _ in range(processes - 1)]

    def work(i, share, which):
        loss, grads = _weighted(loss_fns[which], named, *share)
        if i == 0:
            return loss, grads
        for name in grads.keys() & named.keys():
            theirs[i - 1][name][...] = grads[name]
            grads[name] = None
        return loss, grads

    with worker_pool(work, processes) as call:

        def value_and_grad_of(which, batch):
            shares = enumerate(cut_batch(batch, processes))
            results = call([(i, share, which) for i, share in shares])
            for room, (_, grads) in zip(theirs, results[1:], strict=False):
                grads |= {name: room[name] for name in grads.keys() & room.keys()}
            return _sum(results)

        yield [partial(value_and_grad_of, which) for which in range(len(loss_fns))]


def _weighted(loss_fn, params, weight, part):
    loss, backward = loss_fn(params, *part)
    grads = {}
    backward(grads)
    if weight != 1:
        for name in grads:
            grads[name] *= weight
    return loss * weight, grads


def _sum(results):
    (loss, grads), *others = results
    for other_loss, other_grads in others:
        loss = loss + other_loss
        for name, dw in other_grads.items():
            add_grad(grads, name, dw)
    return loss, grads
