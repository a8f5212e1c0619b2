"""Steps as CUDA graphs: all kernels of a sampling or training step started by one launch.

Twins of `sampling.pipeline.predictor` and `training.step.gradients`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from tinyldm.backend import Array, array_module, on_host
from tinyldm.kernels.cached import fixed
from tinyldm.kernels.registry import NEVER, kernel
from tinyldm.nn.protocol import Params
from tinyldm.threads import spans

WARM = 2  # calls before the capture: what is compiled, or kept for later, is there by then


class GraphLeftOut(UserWarning):
    """A step could not be captured as a graph, and runs kernel by kernel."""


class Graphs:
    """Graphs that work on the memory of one pool, for steps that run one after the other."""

    def __init__(self, xp: ModuleType):
        self.xp, self.cuda, self.steps = xp, xp.cuda, []
        self.stream, self.pool = xp.cuda.Stream(non_blocking=True), xp.cuda.MemoryPool(self._malloc)

    def _malloc(self, size):
        """Allocate; where memory is short, with an error for which the pool gives nothing up.

        It would free what kernels of the graph have used, and will use again.
        """
        try:
            return self.cuda.MemoryPointer(self.cuda.Memory(size), 0)
        except RuntimeError as error:
            raise MemoryError(str(error)) from error

    def captured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function(*arrays)` as a graph, one for each set of shapes.

        The function must do the same whatever the arrays hold, and read nothing else that changes
        but in its place. Its results are overwritten by the next call. Where the first array is not
        float32, for which alone there are products here, it runs as it is. So it does where it
        cannot be captured, and a warning says why.
        """
        known = {}

        def call(*arrays):
            if arrays[0].dtype != "float32":
                return function(*arrays)
            key = tuple((x.shape, x.dtype) for x in arrays)
            if key not in known:
                known[key] = _Step(self, function)
                self.steps.append(known[key])
            return known[key](*arrays)

        return call

    def capture(self, function: Callable[..., Any], inputs: list[Array]) -> tuple[Any, Any]:
        """Note all launches of a function → the graph, and the results."""
        self.xp.get_default_memory_pool().free_all_blocks()  # of the calls before
        with self.stream, self.cuda.using_allocator(self.pool.malloc):
            self.stream.begin_capture()
            try:
                result = function(*inputs)
            finally:
                graph = self.stream.end_capture()
        return graph, result

    def close(self) -> None:
        """Give the memory back, which a pool does not do by itself."""
        for step in self.steps:
            step.graph = step.inputs = step.result = None
        self.pool.free_all_blocks()


class _Step:
    """A function of arrays of certain shapes."""

    def __init__(self, graphs, function):
        self.graphs, self.function, self.calls, self.graph = graphs, function, 0, None

    def __call__(self, *arrays):
        self.calls += 1
        if self.calls == WARM + 1:
            self.inputs = [x.copy() for x in arrays]
            try:
                self.graph, self.result = self.graphs.capture(self.function, self.inputs)
            except (RuntimeError, MemoryError) as error:
                warnings.warn(f"no graph, kernel by kernel: {error}", GraphLeftOut, stacklevel=2)
        if self.graph is None:
            return self.function(*arrays)
        for x, place in zip(arrays, self.inputs, strict=True):
            place[...] = x
        self.graph.launch()
        return self.result


@contextlib.contextmanager
def _graphs(xp):
    graphs = Graphs(xp)
    try:
        yield graphs
    finally:
        graphs.close()


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
    with fixed(*conditions), _graphs(xp) as graphs:
        steps = [graphs.captured(partial(_predict, network, some)) for some in conditions]

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
    with _graphs(array_module(next(iter(params.values())))) as graphs:
        steps = [graphs.captured(partial(_loss_and_grads, f, named)) for f in loss_fns]
        yield [partial(gradient_of, step) for step in steps]


def _loss_and_grads(loss_fn, params, *batch):
    loss, backward = loss_fn(params, *batch)
    grads = {}
    backward(grads)
    return loss, grads
