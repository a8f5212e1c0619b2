"""Steps as CUDA graphs: all kernels of a sampling or training step started by one launch.

Twins of `sampling.pipeline.predictor` and `training.step.gradients`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.cached import fixed
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.nn.protocol import Params
from tinyldm.threads import spans

WARM = 2  # calls before the capture: what is compiled, or kept for later, is there by then


class GraphLeftOut(UserWarning):
    """A step could not be captured as a graph, and runs kernel by kernel."""


def captured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(*arrays)` as a graph, one for each set of shapes.

    The function must do the same whatever the arrays hold, and read nothing else that changes but
    in its place. Its results are overwritten by the next call. With real numbers that are not
    float32, for which there are no products here, it runs as it is. So it does where it cannot be
    captured, and a warning says why.
    """
    steps = {}

    def call(*arrays):
        if any(x.dtype.kind in "fc" and x.dtype != "float32" for x in arrays):
            return function(*arrays)
        key = tuple((x.shape, x.dtype) for x in arrays)
        step = steps.setdefault(key, _Step(function))
        return step(*arrays)

    return call


class _Step:
    """A function of arrays of certain shapes."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *arrays):
        self.calls += 1
        if self.calls == WARM + 1:
            try:
                self.capture(arrays)
            except RuntimeError as error:
                warnings.warn(f"no graph, kernel by kernel: {error}", GraphLeftOut, stacklevel=2)
        if self.graph is None:
            return self.function(*arrays)
        for x, place in zip(arrays, self.inputs, strict=True):
            place[...] = x
        self.graph.launch()
        return self.result

    def capture(self, arrays):
        """Note all launches of the function, and keep the memory that they work on."""
        cuda = array_module(arrays[0]).cuda
        self.inputs = [x.copy() for x in arrays]
        self.pool, stream = cuda.MemoryPool(), cuda.Stream(non_blocking=True)
        with stream, cuda.using_allocator(self.pool.malloc):
            stream.begin_capture()
            try:
                self.result = self.function(*self.inputs)
            finally:
                graph = stream.end_capture()
        self.graph = graph


def _of_condition(network, condition, at_once):
    return NEVER if on_host(condition) else -1.0


@kernel("sampling.pipeline.predictor", cost=_of_condition)
@contextlib.contextmanager
def graph_predictor(
    network: Callable[[Array, Array, Any], Array], condition: Array, at_once: int
) -> Iterator[Callable[[Array, float], Array]]:
    """Launch a graph for every `at_once` samples; what follows from the condition is cached."""
    xp, n = array_module(condition), len(condition)
    shares = spans(n, -(-n // at_once))
    conditions = [condition[span] for span in shares]
    with fixed(*conditions):
        steps = [captured(partial(_predict, network, some)) for some in conditions]

        def predict(x, t):
            parts = (x[span] for span in shares)
            predictions = [
                step(part, xp.full(len(part), t)) for step, part in zip(steps, parts, strict=True)
            ]
            return xp.concatenate(predictions)  # a copy, which the next step leaves alone

        yield predict


def _predict(network, condition, x, t):
    return network(x, t, condition)


def _of_params(loss_fns, params, others, processes=None):
    return NEVER if any(map(on_host, params.values())) else -1.0


@kernel("training.step.gradients", cost=_of_params)
@contextlib.contextmanager
def graph_gradients(
    loss_fns: Sequence[Callable], params: Params, others: Params, processes: int | None = None
) -> Iterator[list[Callable]]:
    """Launch a graph for the loss of a batch and all gradients."""

    def gradient_of(step, batch):
        loss, grads = step(*batch)
        return loss.copy(), dict(grads)  # the loss is looked at later

    named = params | others
    steps = [captured(partial(_loss_and_grads, loss_fn, named)) for loss_fn in loss_fns]
    yield [partial(gradient_of, step) for step in steps]


def _loss_and_grads(loss_fn, params, *batch):
    loss, backward = loss_fn(params, *batch)
    grads = {}
    backward(grads)
    return loss, grads
