"""Layers: the functions of this package with named parameters and initial values.

A layer remembers sizes and names, never activations. Its parameters live in a dict that the caller
owns, under the names of the checkpoint, so to save, load, cast, average or move a model is a dict
comprehension.
"""

import math
from collections.abc import Callable

from numpy.random import Generator

from tinyldm.backend import Array
from tinyldm.nn import functional as F
from tinyldm.nn.conv import Padding, conv2d
from tinyldm.nn.norms import group_norm, group_norm_silu, layer_norm
from tinyldm.nn.protocol import Backward, Params, add_grad, recompute, wants_grad

Shape = tuple[int, ...]
Initialiser = Callable[[Generator, Shape], Array]


class Layer:
    """Base of everything with parameters: `layer(params, *inputs) → (y, backward)`.

    A leaf overrides `parameters`; the parameters of everything else are those of its attributes.
    """

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        """Return {name: (shape in memory, initialiser)}, children in the order of construction."""
        merged = {}
        for value in vars(self).values():
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, Layer):
                    merged.update(child.parameters())
        return merged

    def shapes(self) -> dict[str, Shape]:
        """Return {name: shape} that a checkpoint must hold (4-D: kh, kw, c_in, c_out)."""
        return {name: shape for name, (shape, _) in self.parameters().items()}

    def init(self, rng: Generator) -> Params:
        """Draw fresh parameters {name: float32 array} from `rng`, a numpy.random.Generator."""
        return {
            name: initialise(rng, shape).astype("float32")
            for name, (shape, initialise) in self.parameters().items()
        }


class Recomputed(Layer):
    """A layer that forgets its activations and recomputes them in its backward pass."""

    def __init__(self, layer: Layer):
        self.layer = layer

    def __call__(self, params: Params, *inputs: Array | None) -> tuple[Array, Backward]:
        return recompute(self.layer, params, *inputs)


# ------------------------------------------------------------------------------------ initialisers


def uniform_fan_in(fan_in: int) -> Initialiser:
    """Uniform ±1/√fan_in, for weights and biases, PyTorch's default (after LeCun et al. 1998).

    Biases matter in a U-Net: with all of them zero, zero padding leaves no trace in the features,
    and the network is slow to find out where in the image it is.
    """
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape: rng.uniform(-bound, bound, shape)


def normal(std: float) -> Initialiser:
    """Normal distribution N(0, std²)."""
    return lambda rng, shape: rng.normal(0, std, shape)


def zeros(rng: Generator, shape: Shape) -> Array:
    """All zeros. Takes as many random numbers as others, so that later draws stay the same."""
    return rng.uniform(0, 0, shape)


def ones(rng: Generator, shape: Shape) -> Array:
    """All ones. Takes as many random numbers as `zeros`."""
    return zeros(rng, shape) + 1


# ------------------------------------------------------------------------------------------ layers


class Leaf(Layer):
    """A function of this package with named weights: y = function(x, *weights, *options).

    weights: {name: (shape in memory, initialiser)}, in the order of the function's arguments.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Array, Backward]],
        weights: dict[str, tuple[Shape, Initialiser]],
        *options: object,
    ):
        self.function, self.weights, self.options = function, weights, options
        self.weight = next(iter(weights))  # full name of the weight, without that of the bias

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        return self.weights

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        weights = map(params.__getitem__, self.weights)  # by name, in the order of the arguments
        y, function_back = self.function(x, *weights, *self.options)
        if function_back is None:
            return y, None

        def backward(dy, grads):
            dx, *dweights = function_back(dy, weights=wants_grad(grads, *self.weights))
            for name, dw in zip(self.weights, dweights, strict=False):  # there may be no bias
                add_grad(grads, name, dw)
            return dx

        return y, backward


class Linear(Leaf):
    """Maps x (..., d_in) → (..., d_out)."""

    def __init__(
        self, name: str, d_in: int, d_out: int, bias: bool = True, init: Initialiser | None = None
    ):
        init = init or uniform_fan_in(d_in)
        weights = {f"{name}.weight": ((d_out, d_in), init)}
        if bias:
            weights[f"{name}.bias"] = ((d_out,), init)
        super().__init__(F.linear, weights)
        self.d_in, self.d_out = d_in, d_out


class Conv2d(Leaf):
    """Maps x (n, h, w, c_in) → (n, h', w', c_out), of the same size by default at stride 1."""

    def __init__(
        self,
        name: str,
        c_in: int,
        c_out: int,
        kernel: int = 3,
        stride: int = 1,
        padding: Padding | None = None,
        init: Initialiser | None = None,
    ):
        init = init or uniform_fan_in(kernel * kernel * c_in)
        weight, bias = ((kernel, kernel, c_in, c_out), init), ((c_out,), init)
        padding = kernel // 2 if padding is None else padding
        weights = {f"{name}.weight": weight, f"{name}.bias": bias}
        super().__init__(conv2d, weights, stride, padding)


class GroupNorm(Leaf):
    """Normalises x (n, ..., c) by groups of channels; with `silu` the activation follows.

    Raises ValueError where the channels do not divide into `groups`.
    """

    def __init__(self, name: str, c: int, groups: int, eps: float, silu: bool = False):
        if c % groups:
            raise ValueError(f"{name}: {c} channels do not divide into {groups} groups")
        weights = {f"{name}.weight": ((c,), ones), f"{name}.bias": ((c,), zeros)}
        super().__init__(group_norm_silu if silu else group_norm, weights, groups, eps)


class LayerNorm(Leaf):
    """Normalises the last axis of x (..., d)."""

    def __init__(self, name: str, d: int, eps: float = 1e-5):
        weights = {f"{name}.weight": ((d,), ones), f"{name}.bias": ((d,), zeros)}
        super().__init__(layer_norm, weights, eps)


class Embedding(Leaf):
    """Looks up integers (...) → (..., d). Its backward pass returns None: they have no gradient."""

    def __init__(self, name: str, count: int, d: int, std: float = 1.0):
        super().__init__(F.embedding, {f"{name}.weight": ((count, d), normal(std))})


class Offset(Leaf):
    """Adds a learned table (length, d), such as positions, to x (n, l, d) with l ≤ length.

    Called with more tokens it raises ValueError.
    """

    def __init__(self, name: str, length: int, d: int, std: float):
        super().__init__(F.offset, {name: ((length, d), normal(std))})
