"""The gradient of a batch, on all cores; the twin of `training.step.value_and_grad`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tinyldm.backend import Array, on_host
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.kernels.cpu.processes import available, team
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.machine import keep_freed_memory
from tinyldm.threads import free_cores, map_threads

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


@contextlib.contextmanager
def gradient(loss_fn: Callable, params: Flat, processes: int | None = None) -> Iterator[Gradient]:
    """`value_and_grad` of one function for many steps: yields batch → (loss, gradients).

    The shards go to copies of this process, where there can be any (`processes`, default: what is
    `available`), else to threads. The result is the same to the last bit. Other processes see what
    becomes of `params`, if they are shared, and nothing else that changes in the meantime.
    """
    with gradients([loss_fn], params, {}, processes) as (gradient_of,):
        yield gradient_of


@contextlib.contextmanager
def gradients(
    loss_fns: Sequence[Callable],
    params: Flat,
    others: dict[str, Array],
    processes: int | None = None,
) -> Iterator[list[Gradient]]:
    """`gradient` of several functions, which the same processes work on, one after the other.

    Each is given `params` and `others`, a `Flat` or nothing, in one dict. Gradients under other
    names than theirs are to be small: they come back through a pipe.
    """
    keep_freed_memory()
    named = params | others if others else params
    on_cpu = on_host(params.flat)
    processes = processes or (available() if on_cpu and params.shared else 1)
    if processes == 1:
        yield [partial(value_and_grad, loss_fn, named) for loss_fn in loss_fns]
        return
    theirs = [Flat(named, shared=True) for _ in range(processes - 1)]

    def work(i, share, which):
        loss, grads = _weighted(loss_fns[which], named, *share)
        if i == 0:
            return loss, grads
        for name in grads.keys() & named.keys():
            theirs[i - 1][name][...] = grads[name]
            grads[name] = None
        return loss, grads

    with team(work, processes) as call:

        def value_and_grad_of(which, batch):
            shares = enumerate(cut_batch(batch, processes))
            results = call([(i, share, which) for i, share in shares])
            for room, (_, grads) in zip(theirs, results[1:], strict=False):
                grads |= {name: room[name] for name in grads.keys() & room.keys()}
            return _sum(results)

        yield [partial(value_and_grad_of, which) for which in range(len(loss_fns))]


def cut_batch(batch: tuple[Array, ...], count: int) -> list[tuple[float, tuple[Array, ...]]]:
    """Cut into `count` parts (share of the batch, part), or fewer where one would be empty."""
    n = len(batch[0])
    if n == 0 or any(len(array) != n for array in batch):
        raise ValueError(
            "value_and_grad: expected arrays of one length, at least 1, found "
            f"{[len(array) for array in batch]}"
        )
    count = min(n, count)
    bounds = [n * i // count for i in range(count + 1)]
    return [
        ((end - begin) / n, tuple(array[begin:end] for array in batch))
        for begin, end in zip(bounds, bounds[1:], strict=False)
    ]


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
            if name in grads:
                grads[name] += dw
            else:
                grads[name] = dw
    return loss, grads
