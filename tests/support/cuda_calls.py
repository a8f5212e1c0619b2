"""Calls of the kernels for a GPU, on the double of CuPy."""

import contextlib

import numpy as np
import pytest
import strict
from strategies import Call, random_array, table_first

from tinyldm.kernels import plain
from tinyldm.kernels.cuda import attention, conv, launch, muon, norms
from tinyldm.nn import norms as plain_norms
from tinyldm.nn.attention import attention as plain_attention
from tinyldm.nn.protocol import KERNELS

SMALL = {  # sizes at which a few numbers take several blocks, and several turns of a loop
    launch: {"THREADS": 4, "WARP": 2, "BLOCKS": 2, "MOST_PARTS": 3, "ROWS_OF_A_THREAD": 1},
    norms: {"THREADS": 4, "MOST_SAMPLES": 2},
    muon: {"THREADS": 4},
    attention: {"THREADS": 4, "WARP": 2, "BLOCK_SCORES": 9},
    conv: {"BLOCK_BYTES": 100},
}


@contextlib.contextmanager
def small(yes):
    with pytest.MonkeyPatch.context() as patch:
        for module, limits in SMALL.items() if yes else ():
            for name, value in limits.items():
                patch.setattr(module, name, value)
        yield


def there(x, dtype="float32"):
    """An array of numbers of this dtype on the device; what is no array stays what it is."""
    if not isinstance(x, np.ndarray):
        return x
    return strict.asarray(x.astype(dtype) if x.dtype.kind == "f" else x)


def results(call, arrange=np.asarray, weights=True):
    """y and the gradients of a kernel, for a dy that depends on the seed alone."""
    arrays = [strict.ndarray(arrange(x.astype("float32"))) for x in call.arrays()]
    options = {name: there(x) for name, x in call.options.items()}
    with strict.counting() as counts:
        y, backward = call.function(*arrays, **options)
    dy = strict.ndarray(arrange(dy_of(call, y.shape).astype("float32")))
    with strict.counting() as counts_back:
        gradients = backward(dy) if weights else backward(dy, weights=False)
    for count in (counts, counts_back):
        assert (count.synchronisations, count.uploads) == (0, 0)
    return on_host(y, gradients)


def on_host(y, gradients):
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [x if x is None or isinstance(x, np.ndarray) else x.get() for x in (y, *gradients)]


def dy_of(call, shape):
    return np.asarray(random_array(np.random.default_rng(call.seed + 1), shape))


def plain_twin(twin):
    module, _, name = twin.rpartition(".")
    function = getattr(__import__(module, fromlist=[name]), name)
    return table_first(function) if name == "embedding" else function


def of_twin(function, call):
    """Return y and the gradients of a plain function in float64, for the inputs of a call."""
    arrays = [x.astype("float32").astype("float64") for x in call.arrays()]
    with plain():
        y, backward = function(*arrays, **call.options)
        return on_host(y, backward(dy_of(call, y.shape).astype("float32").astype("float64")))


NORM = {"x": (2, 3, 3, 8), "w": (8,), "b": (8,)}
EXAMPLES = {  # of each function, with nothing in it whose gradient is 0
    "attention": [({"q": (2, 5, 6), "k": (2, 7, 6), "v": (2, 7, 4)}, {"heads": 2, "causal": True})],
    "conv2d": [
        ({"x": (2, 5, 6, 3), "w": (3, 3, 3, 4), "b": (4,)}, {"stride": 2}),
        ({"x": (2, 5, 4, 3), "w": (3, 2, 3, 3)}, {"padding": (1, 0, 2, 1)}),
        ({"x": (2, 5, 4, 3), "w": (1, 1, 3, 3), "b": (3,)}, {"padding": 0}),
    ],
    "embedding": [({"table": (5, 3)}, {"ids": np.array([[1, 4, 1], [0, 0, 1]])})],
    "geglu": [({"x": (3, 4, 10)}, {})],
    "group_norm": [(NORM, {"groups": 2, "eps": 1e-5})],
    "group_norm_silu": [(NORM, {"groups": 2, "eps": 1e-5})],
    "linear": [({"x": (2, 3, 5), "w": (4, 5), "b": (4,)}, {}), ({"x": (3, 4), "w": (4, 4)}, {})],
    "layer_norm": [(NORM, {"eps": 1e-5})],
}


def examples(twin, name, kernel=None):
    """Small calls of a kernel, or of one that has taken its place."""
    (known,) = (k.function for k in KERNELS[twin] if k.function.__name__ == name)
    function = kernel or known
    if twin.endswith(".embedding"):
        function = table_first(function)
    described = EXAMPLES.get(twin.rpartition(".")[2], [({"x": (3, 4, 5)}, {})])
    return [Call(function, shapes, 0, options) for shapes, options in described]


def whole(x, times):
    """Whole numbers, so that their products are not rounded."""
    return (times * x).astype("int64").astype(x.dtype)


def with_barriers():
    """Twins and calls of the kernels that have barriers, over several samples and turns of loops.

    Scores are so far apart that with a largest one that is none, e^score overflows.
    """

    def far_apart(function):
        return lambda q, k, v, heads: function(whole(q, 200), whole(k, 2), v, heads)

    x = {"x": (5, 6, 7, 20), "w": (20,), "b": (20,)}
    silu = Call(norms.fused_group_norm_silu, x, 0, {"groups": 2, "eps": 1e-5})
    layer_norm = Call(norms.fused_layer_norm, x, 1, {"eps": 1e-5})
    attend = far_apart(attention.fused_attention)
    calls = []
    for m in (11, 2):  # of two scores, both are far below 0 now and then
        qkv = {"q": (2, 9, 8), "k": (2, m, 8), "v": (2, m, 8)}
        calls.append((far_apart(plain_attention), Call(attend, qkv, 2, {"heads": 2})))
    return [(plain_norms.group_norm_silu, silu), (plain_norms.layer_norm, layer_norm), *calls]


def far_from_zero():
    """Twins and calls of norms whose mean, in float32, is rounded by more than their answers are.

    E[x²] − E[x]² would have no right digit here, and a rounded mean three at most.
    """

    def away(function):
        return lambda x, *others, **options: function(whole(x, 128) / 128 + 1e4, *others, **options)

    x = {"x": (2, 7, 6, 20), "w": (20,), "b": (20,)}
    options = {"group_norm": {"groups": 2}, "group_norm_silu": {"groups": 2}, "layer_norm": {}}
    return [
        (away(getattr(plain_norms, name)),
         Call(away(getattr(norms, f"fused_{name}")), x, 3, {"eps": 1e-5} | more))
        for name, more in options.items()
    ]  # fmt: skip
