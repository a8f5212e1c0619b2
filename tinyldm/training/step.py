"""One step of training: batch → loss → gradient → Muon and AdamW."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.machine import keep_freed_memory
from tinyldm.nn.optim import MAX_NORM, adamw, clip_factor, global_norm, muon
from tinyldm.nn.protocol import Params, add_grad, replaceable
from tinyldm.threads import cut_batch
from tinyldm.training.adversarial import Adversarial, Gradient, alternating
from tinyldm.training.metrics import Diverged
from tinyldm.training.state import State


def train_step(
    state: State, loss_and_grads: Gradient, batch: tuple[Array, ...], rate: float, ema: float
) -> tuple[Array, Array]:
    """Take one optimizer step on one batch → loss and norm of the gradient, on the device.

    loss_and_grads: of a batch, at the state's parameters. Where the gradients have those of a
    discriminator too, that makes a step of its own optimizer. Where loss or gradient is no finite
    number, the state stays as it is: on the CPU NotFinite is raised, and on a GPU, which would have
    to be waited for, the step is taken back.
    """
    loss, grads = loss_and_grads(batch)
    of_discriminator = {}
    for name in grads.keys() & state.discriminator.keys():
        of_discriminator[name] = grads.pop(name)
    norm = global_norm(grads)
    if of_discriminator:
        with np.errstate(invalid="ignore"):
            norm = norm + 0 * global_norm(of_discriminator)  # no finite number where that is none
    if on_host(norm) and not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFinite(loss, norm, grads | of_discriminator)
    with _taken_back(state, loss, norm):
        _update(state, grads, of_discriminator, rate, clip_factor(norm, MAX_NORM), ema)
    return loss, norm


@contextlib.contextmanager
def _taken_back(state, loss, norm):
    """Put the old values back, on a GPU and without a wait, where loss or norm is not finite."""
    if on_host(norm):
        yield
        return
    xp = array_module(norm)
    groups = [state.params, state.average, *state.moments.values()]
    if state.discriminator:
        groups += [state.discriminator, *state.discriminator_moments.values()]
    before = [group.flat.copy() for group in groups]
    yield
    fine = xp.isfinite(loss) & xp.isfinite(norm)
    for group, old in zip(groups, before, strict=True):
        group.flat[...] = xp.where(fine, group.flat, old)


def _update(state, grads, of_discriminator, rate, scale, ema):
    stage = getattr(state.config, state.stage)
    if stage.muon:
        inner = {}
        for name in state.params.first:
            inner[name] = grads.pop(name)
        muon(
            state.params, inner, state.moments["m"], state.average, state.step,
            stage.muon * (rate / stage.rate), scale, ema,
        )  # fmt: skip
    adamw(state.params, grads, state.moments, state.average, state.step, rate, scale, ema=ema)
    if of_discriminator:
        _discriminator_step(state, of_discriminator, rate)


class NotFinite(Diverged):
    """The loss of a batch, or its gradient, is no finite number."""

    def __init__(self, loss: Array, norm: Array, grads: Params | None = None):
        grads = grads or {}
        where = next((name for name, g in grads.items() if not math.isfinite(g.sum())), None)
        super().__init__(
            f"the loss is {float(loss):g}, the norm of the gradient {float(norm):g}"
            + (f"; the first gradient that is no finite number is that of {where}" if where else "")
        )


def _discriminator_step(state, grads, rate):
    begun = math.ceil(state.config.adversarial_start * state.total)
    adamw(  # its average would be of no use: it stays the same as the parameters
        state.discriminator, grads, state.discriminator_moments, state.discriminator,
        max(0, state.step - begun), rate,
    )  # fmt: skip


@replaceable
def value_and_grad(
    loss_fn: Callable, params: Params, batch: tuple[Array, ...]
) -> tuple[Array, Params]:
    """Return the mean loss of a batch and its gradients {name: array}.

    loss_fn: `loss_fn(params, *batch) → (mean loss, backward(grads))`. batch: a tuple of arrays with
    equal first axes; ValueError where they are not, or empty.
    """
    for array in batch:
        if len(array) != len(batch[0]) or len(array) == 0:
            lengths = [len(array) for array in batch]
            raise ValueError(
                f"value_and_grad: expected arrays of one length, at least 1, found {lengths}"
            )
    loss, backward = loss_fn(params, *batch)
    grads = {}
    backward(grads)
    return loss, grads


@replaceable
@contextlib.contextmanager
def gradients(
    loss_fns: Sequence[Callable], params: Params, others: Params, processes: int | None = None
) -> Iterator[list[Gradient]]:
    """Yield, for many steps, batch → (loss, gradients) of several functions of the same parameters.

    Each is given `params` and `others` in one dict. processes: how many may share the work.
    """
    yield [partial(value_and_grad, loss_fn, params | others) for loss_fn in loss_fns]


@contextlib.contextmanager
def gradient(loss_fn: Callable, params: Params, processes: int | None = None) -> Iterator[Gradient]:
    """Yield batch → (loss, gradients) of one function, for many steps."""
    with gradients([loss_fn], params, {}, processes) as (gradient_of,):
        yield gradient_of


def accumulated(gradient_of: Gradient, parts: int) -> Gradient:
    """Accumulate the gradient over so many parts of a batch, for the memory of one part."""
    if parts == 1:
        return gradient_of

    def of_parts(batch):
        loss, sums = 0.0, {}
        for weight, part in cut_batch(batch, parts):
            part_loss, grads = gradient_of(part)
            loss = loss + weight * part_loss
            for name, dw in grads.items():
                add_grad(sums, name, weight * dw)  # a copy: the next part may use the same memory
        return loss, sums

    return of_parts


@contextlib.contextmanager
def stage_gradient(
    loss_fn: Callable | Adversarial,
    state: State,
    parts: int,
    numbers: dict[str, Array],
    processes: int | None = None,
) -> Iterator[Gradient]:
    """Yield the gradient of a stage's loss for many steps: batch → (loss, gradients).

    parts: of a batch, one after the other. numbers: receives further values of a step, for its
    log. processes: see `gradients`.
    """
    keep_freed_memory()
    losses = [loss_fn]
    if isinstance(loss_fn, Adversarial):
        losses = [loss_fn.plain, loss_fn.generator, loss_fn.discriminator]
    with gradients(losses, state.params, state.discriminator, processes) as at_once:
        first, *others = (accumulated(gradient_of, parts) for gradient_of in at_once)
        yield alternating(state, numbers, first, *others) if others else first
