"""What Hypothesis draws: sizes, options and a seed. The numbers come from a generator so seeded.

Sizes fit together by construction (channels = groups × k), so no example is thrown away, and a
failing one is printed as a line of small integers.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import strategies as st

from tinyldm.backend import array_module
from tinyldm.kernels import attention as attention_module
from tinyldm.kernels import blocking, im2col, nearest_codes
from tinyldm.kernels.cpu import layer_norm as layer_norm_module
from tinyldm.kernels.cpu import winograd
from tinyldm.nn import activations, quantize
from tinyldm.nn import functional as F
from tinyldm.nn.attention import attention
from tinyldm.nn.conv import conv2d
from tinyldm.nn.norms import group_norm, group_norm_silu, layer_norm, unit_norm
from tinyldm.nn.protocol import KERNELS
from tinyldm.testing.strategies import attentions, convolutions, group_norms

seeds = st.integers(0, 2**32 - 1)
batches = st.integers(1, 3)
sizes = st.integers(1, 5)


@dataclass(frozen=True)
class Call:
    """One call of a function, all but its numbers: `call(*call.arrays())`."""

    function: Callable
    shapes: dict  # of the array arguments, in their order
    seed: int
    options: dict = field(default_factory=dict)  # the other arguments, by keyword
    batched: tuple = ("x",)  # names of arrays and options whose first axis is the batch

    def __call__(self, *arrays):
        # A weight per sample has the dtype of the rest.
        dtype = arrays[0].dtype
        options = {k: v.astype(dtype) if _is_real(v) else v for k, v in self.options.items()}
        return self.function(*arrays, **options)

    def arrays(self, dtype="float64"):
        rng = np.random.default_rng(self.seed)
        return [random_array(rng, shape, dtype) for shape in self.shapes.values()]


def called(function, names, drawn, batched=("x",), **options):
    """The call of a function with arguments that `tinyldm.testing.strategies` drew."""
    shapes = {name: x.shape for name, x in zip(names, drawn.inputs, strict=True)}
    return Call(function, shapes, drawn.inputs.seed, drawn.options | options, batched)


def _is_real(x):
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def random_array(rng, shape, dtype="float64"):
    """Normal numbers about 0.3: no symmetry that could hide a lost sign or a lost mean."""
    x = rng.normal(0.3, 1, shape)
    if np.dtype(dtype).kind == "c":
        x = x + 1j * rng.normal(0, 1e-3, shape)
    return x.astype(dtype)


def random_params(layer, seed=0):
    """Random values for everything, scales and shifts too: ones and zeros would hide faults."""
    rng = np.random.default_rng(seed)
    return {name: 0.5 * random_array(rng, shape) for name, shape in layer.shapes().items()}


# --------------------------------------------------------------------------- calls of each function


@st.composite
def linear_calls(draw):
    d_in, d_out = draw(sizes), draw(sizes)
    x = (*draw(leading_axes()), d_in)
    bias = {"b": (d_out,)} if draw(st.booleans()) else {}
    return Call(F.linear, {"x": x, "w": (d_out, d_in)} | bias, draw(seeds))


@st.composite
def embedding_calls(draw):
    count, d, seed = draw(sizes), draw(sizes), draw(seeds)
    ids = np.random.default_rng(seed).integers(0, count, draw(leading_axes()))
    return Call(_embedding, {"table": (count, d)}, seed, {"ids": ids}, ("ids",))


def table_first(function):
    """An embedding that takes its table first, for that is what has a gradient."""

    @functools.wraps(function)
    def embedding(table, ids):
        y, embedding_back = function(ids, table)
        return y, embedding_back and (lambda dy: embedding_back(dy)[1])

    return embedding


_embedding = table_first(F.embedding)


@st.composite
def activation_calls(draw, function):
    return Call(function, {"x": (*draw(leading_axes()), draw(sizes))}, draw(seeds))


@st.composite
def geglu_calls(draw):
    return Call(activations.geglu, {"x": (*draw(leading_axes()), 2 * draw(sizes))}, draw(seeds))


epsilons = st.sampled_from([1e-5, 1e-2])


@st.composite
def group_norm_calls(draw, function=group_norm):
    x = draw(st.sampled_from(["n c", "n l c", "n h w c"]))
    drawn = draw(group_norms(x, "c", "c"))
    return called(function, "xwb", drawn, eps=draw(epsilons))


@st.composite
def offset_calls(draw):
    n, l, d = draw(batches), draw(sizes), draw(sizes)
    table = (l + draw(st.integers(0, 2)), d)
    return Call(F.offset, {"x": (n, l, d), "table": table}, draw(seeds), {})


@st.composite
def layer_norm_calls(draw):
    d = draw(st.sampled_from([*range(3, 9), 65, 130]))
    shapes = {"x": (*draw(leading_axes()), d), "w": (d,), "b": (d,)}
    return Call(layer_norm, shapes, draw(seeds), {"eps": draw(epsilons)})


@st.composite
def unit_norm_calls(draw):
    """One number alone has no direction, and no gradient but rounding."""
    x = (*draw(leading_axes()), draw(st.integers(2, 6)))
    return Call(unit_norm, {"x": x}, draw(seeds), {"eps": draw(epsilons)})


@st.composite
def upsample_calls(draw):
    n, h, w, c = draw(batches), draw(sizes), draw(sizes), draw(sizes)
    size = (2 * h - draw(st.integers(0, 1)), 2 * w - draw(st.integers(0, 1)))
    options = {"size": draw(st.sampled_from([None, size]))}
    return Call(F.upsample_nearest, {"x": (n, h, w, c)}, draw(seeds), options)


@st.composite
def mean_calls(draw):
    x, axes = draw(
        st.sampled_from([((2, 3, 4, 2), (1, 2)), ((3, 4, 2), (1,)), ((1, 1, 1), (1, 2))])
    )
    return Call(F.mean, {"x": x}, draw(seeds), {"axes": axes})


@st.composite
def concatenate_calls(draw):
    x = (*draw(leading_axes(most=3)), draw(sizes))
    axis = draw(st.integers(1 - len(x), len(x) - 1).filter(lambda axis: axis != 0))
    y = list(x)
    y[axis] = draw(sizes)
    shapes = {"x": x, "y": tuple(y)}
    return Call(F.concatenate, shapes, draw(seeds), {"axis": axis}, ("x", "y"))


sides = st.integers(0, 3)
paddings = sides | st.tuples(sides, sides, sides, sides)
# What a kernel of the convolution can do, where it is not everything.
CONV_LIMITS = {
    "pointwise": {"kernels": st.just(1), "strides": st.just(1), "paddings": st.just(0)},
    "winograd4": {"kernels": st.just(3), "strides": st.just(1)},
    "winograd2": {"kernels": st.just(3), "strides": st.just(1)},
}


@st.composite
def conv_calls(draw, kernel=None):
    """Convolutions of every kind, or those that a kernel can do."""
    limits = {"paddings": paddings} | CONV_LIMITS.get(kernel, {})
    bias = ["o"] * draw(st.booleans())
    drawn = draw(convolutions("n h w i", "kh kw i o", *bias, **limits))
    return called(conv2d, "xwb"[: 2 + len(bias)], drawn)


def attention_calls():
    return attentions().map(lambda drawn: called(attention, "qkv", drawn, ("q", "k", "v")))


@st.composite
def mse_calls(draw):
    x, seed = (*draw(leading_axes()), draw(sizes)), draw(seeds)
    weight = np.random.default_rng(seed).uniform(0.5, 2, x[0])
    options = draw(st.sampled_from([{}, {"weight": weight}]))
    return Call(F.mse, {"x": x, "target": x}, seed, options, ("x", "target", "weight"))


@st.composite
def kl_calls(draw):
    x = (*draw(leading_axes()), draw(sizes))
    shapes = {"mean": x, "logvar": x}
    return Call(F.kl_to_standard_normal, shapes, draw(seeds), batched=("mean", "logvar"))


@st.composite
def hinge_calls(draw):
    x = (*draw(leading_axes()), draw(sizes))
    return Call(F.hinge, {"on_real": x, "on_fake": x}, draw(seeds), batched=("on_real", "on_fake"))


@st.composite
def weighted_mean_calls(draw):
    x, seed = (*draw(leading_axes()), draw(sizes)), draw(seeds)
    weight = np.random.default_rng(seed).uniform(-2, 2, x[0])
    return draw(
        st.sampled_from(
            [
                Call(F.weighted_mean, {"x": x}, seed, {"weight": weight}, ("x", "weight")),
                Call(F.weighted_mean, {"x": x}, seed, {"weight": -0.5}),
            ]
        )
    )


@st.composite
def cross_entropy_calls(draw):
    n, k, seed = draw(st.integers(1, 4)), draw(sizes), draw(seeds)
    labels = np.random.default_rng(seed).integers(0, k, n)
    shapes, batched = {"logits": (n, k)}, ("logits", "labels")
    return Call(F.cross_entropy, shapes, seed, {"labels": labels}, batched)


def leading_axes(most=3):
    """The axes before the last one, the batch first."""
    return st.lists(st.integers(1, 4), min_size=1, max_size=most).map(tuple)


@st.composite
def straight_through_calls(draw):
    """The codebook's own gradient is none, so it is no argument here."""
    shape, seed = (*draw(leading_axes()), draw(sizes)), draw(seeds)
    codebook = np.random.default_rng(seed + 1).normal(size=(draw(st.integers(1, 6)), shape[-1]))
    return Call(_straight_through, {"z": shape}, seed, {"codebook": codebook}, ("z",))


def _straight_through(z, codebook):
    codebook = array_module(z).asarray(codebook)
    return quantize.straight_through(z, codebook, quantize.nearest_codes(z, codebook))


@st.composite
def codebook_loss_calls(draw):
    shape, seed = (*draw(leading_axes()), draw(sizes)), draw(seeds)
    k = draw(st.integers(1, 6))
    codes = np.random.default_rng(seed).integers(0, k, shape[:-1])
    options = {"codes": codes, "commitment": draw(st.sampled_from([0.25, 1.0]))}
    shapes = {"z": shape, "codebook": (k, shape[-1])}
    return Call(quantize.codebook_loss, shapes, seed, options, ("z", "codes"))


LOSSES = {
    "mse": mse_calls(),
    "kl_to_standard_normal": kl_calls(),
    "hinge": hinge_calls(),
    "weighted_mean": weighted_mean_calls(),
    "cross_entropy": cross_entropy_calls(),
    "codebook_loss": codebook_loss_calls(),
}
FUNCTIONS = {
    "linear": linear_calls(),
    "embedding": embedding_calls(),
    "silu": activation_calls(activations.silu),
    "leaky_relu": activation_calls(activations.leaky_relu),
    "quick_gelu": activation_calls(activations.quick_gelu),
    "gelu": activation_calls(activations.gelu),
    "geglu": geglu_calls(),
    "group_norm": group_norm_calls(),
    "group_norm_silu": group_norm_calls(group_norm_silu),
    "offset": offset_calls(),
    "layer_norm": layer_norm_calls(),
    "unit_norm": unit_norm_calls(),
    "upsample_nearest": upsample_calls(),
    "mean": mean_calls(),
    "concatenate": concatenate_calls(),
    "conv2d": conv_calls(),
    "attention": attention_calls(),
    "straight_through": straight_through_calls(),
}
EVERYTHING = FUNCTIONS | LOSSES


def method_for(name):
    """Return the method by which `check_gradients` checks a function.

    Where gradients are stopped, or passed straight through, they are no derivatives, but what the
    complex step is made to say: see `nn.quantize`.
    """
    return "complex" if name in ("straight_through", "codebook_loss") else "auto"


# One call of each function at the sizes of a small U-Net.
NATURAL = [
    Call(F.linear, {"x": (2, 64, 96), "w": (128, 96), "b": (128,)}, 0),
    Call(_embedding, {"table": (300, 64)}, 1, {"ids": np.arange(144).reshape(2, 72) ** 2 % 300}),
    Call(activations.silu, {"x": (2, 16, 16, 64)}, 2),
    Call(activations.leaky_relu, {"x": (2, 16, 16, 64)}, 19),
    Call(activations.quick_gelu, {"x": (2, 77, 256)}, 3),
    Call(activations.gelu, {"x": (2, 77, 256)}, 4),
    Call(activations.geglu, {"x": (2, 256, 256)}, 5),
    Call(
        group_norm, {"x": (2, 16, 16, 64), "w": (64,), "b": (64,)}, 6,
        {"groups": 16, "eps": 1e-6},
    ),
    Call(
        group_norm_silu, {"x": (2, 8, 8, 128), "w": (128,), "b": (128,)}, 7,
        {"groups": 32, "eps": 1e-5},
    ),
    Call(layer_norm, {"x": (2, 256, 64), "w": (64,), "b": (64,)}, 8, {"eps": 1e-5}),
    Call(unit_norm, {"x": (2, 16, 16, 64)}, 20),
    Call(F.upsample_nearest, {"x": (2, 8, 8, 64)}, 9, {"size": (15, 16)}),
    Call(F.concatenate, {"x": (2, 8, 8, 64), "y": (2, 8, 8, 32)}, 10),
    Call(F.mean, {"x": (2, 8, 8, 64)}, 20, {"axes": (1, 2)}),
    Call(F.mse, {"x": (2, 16, 16, 4), "target": (2, 16, 16, 4)}, 11),
    Call(F.kl_to_standard_normal, {"mean": (2, 16, 16, 4), "logvar": (2, 16, 16, 4)}, 13),
    Call(F.cross_entropy, {"logits": (64, 10)}, 19, {"labels": np.arange(64) % 10}),
    Call(conv2d, {"x": (2, 16, 16, 32), "w": (3, 3, 32, 48), "b": (48,)}, 14),
    Call(conv2d, {"x": (2, 16, 16, 32), "w": (3, 3, 32, 48)}, 15, {"stride": 2}),
    Call(conv2d, {"x": (2, 16, 16, 64), "w": (3, 3, 64, 64)}, 21),
    Call(conv2d, {"x": (4, 6, 6, 128), "w": (3, 3, 128, 128)}, 22),
    Call(conv2d, {"x": (2, 16, 16, 32), "w": (1, 1, 32, 48)}, 16, {"padding": 0}),
    Call(attention, {"q": (2, 64, 64), "k": (2, 77, 64), "v": (2, 77, 64)}, 17, {"heads": 4}),
    Call(
        attention, {"q": (2, 77, 64), "k": (2, 77, 64), "v": (2, 77, 64)}, 18,
        {"heads": 4, "causal": True},
    ),
]  # fmt: skip


# ------------------------------------------------------------------------------------------ kernels


def _kernel_calls(twin, kernel):
    """Calls of a kernel itself, whether it would be chosen for them or not."""
    name = twin.rpartition(".")[2]
    calls = conv_calls(kernel.__name__) if name == "conv2d" else EVERYTHING[name]
    function = table_first(kernel) if name == "embedding" else kernel
    return calls.map(lambda call: replace(call, function=function))


def _kernels(on_gpu):
    """Every kernel of a differentiable function: {(name of its twin, its own name): calls}."""
    return {
        (twin, kernel.function.__name__): _kernel_calls(twin, kernel.function)
        for twin, kernels in KERNELS.items()
        for kernel in kernels
        if twin.rpartition(".")[2] in EVERYTHING.keys() | {"conv2d"}
        and kernel.function.__module__.startswith("tinyldm.kernels.cuda") == on_gpu
    }


KERNEL_CALLS, CUDA_CALLS = _kernels(on_gpu=False), _kernels(on_gpu=True)


# ------------------------------------------------------------------------------- blocks and layouts

# How much of an array is worked on at a time. At 1 every loop over blocks takes its smallest steps.
block_sizes = st.sampled_from([1, 50, 500, None])


@contextlib.contextmanager
def in_blocks(size):
    """Cut all work of the kernels into blocks of `size` elements or bytes; None changes nothing."""
    limits = [
        *((blocking, name) for name in ("BLOCK", "WORTH_THREADS", "WORTH_WIDE")),
        (layer_norm_module, "WORTH_WIDE"),
        *((im2col, name) for name in ("BLOCK_BYTES", "WEIGHT_BLOCK_BYTES")),
        *((winograd, name) for name in ("BLOCK_BYTES", "WEIGHT_BLOCK_BYTES")),
        *((winograd, name) for name in ("KERNEL_BYTES", "LEAST_TILES", "LEAST_COLUMNS")),
        (attention_module, "BLOCK_SCORES"),
        (nearest_codes, "BLOCK_DISTANCES"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in limits if size else ():
            patch.setattr(module, name, 1 if name.startswith("LEAST") else size)
        yield


def _backwards(x):
    reverse = (slice(None, None, -1),) * x.ndim
    return x[reverse].copy()[reverse]


def _with_gaps(x):
    wide = np.full([2 * size for size in x.shape], np.nan, x.dtype)
    gaps = wide[(slice(None, None, 2),) * x.ndim]
    gaps[...] = x
    return gaps


def _transposed(x):
    return x.swapaxes(0, -1).copy().swapaxes(0, -1)


# The same numbers, elsewhere in memory.
LAYOUTS = {
    "fortran": np.asfortranarray,
    "transposed": _transposed,
    "backwards": _backwards,
    "with gaps": _with_gaps,
}
