"""The gradient of a batch, on all cores."""

from collections.abc import Callable

from tinyldm.backend import Array, cores, map_threads, on_host


def value_and_grad(
    loss_fn: Callable,
    params: dict[str, Array],
    batch: tuple[Array, ...],
    shards: int | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The mean loss of a batch and its gradients {name: array}.

    loss_fn: `loss_fn(params, *part) → (mean loss of the part, backward(grads))`.
    batch: a tuple of arrays with equal first axes. It is cut into `shards` (default: the cores; one
    on a GPU), one thread each; their results are weighted by length, so the cut matters only to
    the rounding. ValueError for arrays of different lengths, or of none.
    """
    n = len(batch[0])
    if n == 0 or any(len(array) != n for array in batch):
        raise ValueError(
            "value_and_grad: expected arrays of one length, at least 1, found "
            f"{[len(array) for array in batch]}"
        )
    shards = min(n, shards or (cores() if on_host(batch[0]) else 1))
    bounds = [n * i // shards for i in range(shards + 1)]

    def run(i):
        begin, end = bounds[i], bounds[i + 1]
        loss, backward = loss_fn(params, *(array[begin:end] for array in batch))
        grads = {}
        backward(grads)
        weight = (end - begin) / n
        if weight != 1:
            for name in grads:
                grads[name] *= weight
        return loss * weight, grads

    (loss, grads), *others = map_threads(run, range(shards))
    for other_loss, other_grads in others:
        loss = loss + other_loss
        for name, dw in other_grads.items():
            if name in grads:
                grads[name] += dw
            else:
                grads[name] = dw
    return loss, grads
