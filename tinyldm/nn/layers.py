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
    """Anything with parameters: `layer(params, *inputs) → (y, backward)`.

    A leaf overrides `parameters`; the parameters of everything else are those of its attributes.
    """

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        """{name: (shape in memory, initialiser)}, children in the order of construction."""
        merged = {}
        for value in vars(self).values():
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, Layer):
                    merged.update(child.parameters())
        return merged

    def shapes(self) -> dict[str, Shape]:
        """{name: shape}: what a checkpoint of this layer must hold (4-D as kh, kw, c_in, c_out)."""
        return {name: shape for name, (shape, _) in self.parameters().items()}

    def init(self, rng: Generator) -> Params:
        """Fresh parameters {name: float32 array} drawn from `rng`, a numpy.random.Generator."""
        return {
            name: initialise(rng, shape).astype("float32")
            for name, (shape, initialise) in self.parameters().items()
        }


class Recomputed(Layer):
    """A layer that forgets its activations and makes them again in its backward pass."""

    def __init__(self, layer: Layer):
        self.layer = layer

    def __call__(self, params: Params, *inputs: Array | None) -> tuple[Array, Backward]:
        return recompute(self.layer, params, *inputs)


# ------------------------------------------------------------------------------------ initialisers


def uniform_fan_in(fan_in: int) -> Initialiser:
    """U(±1/√fan_in), of weights and biases: activations keep about their size (LeCun et al. 1998).

    Biases matter in a U-Net: with all of them zero, zero padding leaves no trace in the features,
    and the network is slow to find out where in the picture it is.
    """
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape: rng.uniform(-bound, bound, shape)


def normal(std: float) -> Initialiser:
    """N(0, std²)."""
    return lambda rng, shape: rng.normal(0, std, shape)


def zeros(rng: Generator, shape: Shape) -> Array:
    """0. Draws as `uniform_fan_in` does: what comes after it starts the same with either."""
    return rng.uniform(0, 0, shape)


def ones(rng: Generator, shape: Shape) -> Array:
    """1. Draws as `zeros` does."""
    return zeros(rng, shape) + 1


# ------------------------------------------------------------------------------------------ layers


def named(
    functional_back: Backward | None, weight: str, bias: str | None = None
) -> Backward | None:
    """Give names to the weight gradients of a function's backward pass, if there is one."""
    if functional_back is None:
        return None

    def backward(dy, grads):
        dx, dw, db = functional_back(dy, weights=wants_grad(grads, weight, bias))
        add_grad(grads, weight, dw)
        if bias is not None:
            add_grad(grads, bias, db)
        return dx

    return backward


class Linear(Layer):
    """x (..., d_in) → (..., d_out)."""

    def __init__(
        self, name: str, d_in: int, d_out: int, bias: bool = True, init: Initialiser | None = None
    ):
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if bias else None
        self.d_in, self.d_out = d_in, d_out
        self.initialise = init or uniform_fan_in(d_in)

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        weight = {self.weight: ((self.d_out, self.d_in), self.initialise)}
        return weight | ({self.bias: ((self.d_out,), self.initialise)} if self.bias else {})

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        y, linear_back = F.linear(x, params[self.weight], params[self.bias] if self.bias else None)
        return y, named(linear_back, self.weight, self.bias)


class Conv2d(Layer):
    """x (n, h, w, c_in) → (n, h', w', c_out); `padding` keeps the size at stride 1 by default."""

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
        self.weight, self.bias = f"{name}.weight", f"{name}.bias"
        self.shape = (kernel, kernel, c_in, c_out)
        self.stride, self.padding = stride, kernel // 2 if padding is None else padding
        self.initialise = init or uniform_fan_in(kernel * kernel * c_in)

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        bias = ((self.shape[3],), self.initialise)
        return {self.weight: (self.shape, self.initialise), self.bias: bias}

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        y, conv_back = conv2d(x, params[self.weight], params[self.bias], self.stride, self.padding)
        return y, named(conv_back, self.weight, self.bias)


class GroupNorm(Layer):
    """Normalises x (n, ..., c) by groups of channels; with `silu` the activation follows.

    Raises ValueError where the channels do not divide into `groups`.
    """

    def __init__(self, name: str, c: int, groups: int, eps: float, silu: bool = False):
        if c % groups:
            raise ValueError(f"{name}: {c} channels do not divide into {groups} groups")
        self.weight, self.bias, self.c = f"{name}.weight", f"{name}.bias", c
        self.groups, self.eps = groups, eps
        self.function = group_norm_silu if silu else group_norm

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        return {self.weight: ((self.c,), ones), self.bias: ((self.c,), zeros)}

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        w, b = params[self.weight], params[self.bias]
        y, norm_back = self.function(x, w, b, self.groups, self.eps)
        return y, named(norm_back, self.weight, self.bias)


class LayerNorm(Layer):
    """x (..., d) → the same shape."""

    def __init__(self, name: str, d: int, eps: float = 1e-5):
        self.weight, self.bias, self.d, self.eps = f"{name}.weight", f"{name}.bias", d, eps

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        return {self.weight: ((self.d,), ones), self.bias: ((self.d,), zeros)}

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        y, norm_back = layer_norm(x, params[self.weight], params[self.bias], self.eps)
        return y, named(norm_back, self.weight, self.bias)


class Embedding(Layer):
    """Whole numbers (...) → (..., d). Its backward pass returns None: numbers have no gradient."""

    def __init__(self, name: str, count: int, d: int, std: float = 1.0):
        self.weight, self.shape, self.std = f"{name}.weight", (count, d), std

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        return {self.weight: (self.shape, normal(self.std))}

    def __call__(self, params: Params, ids: Array) -> tuple[Array, Backward]:
        y, embedding_back = F.embedding(params[self.weight], ids)

        def backward(dy, grads):
            if wants_grad(grads, self.weight):
                add_grad(grads, self.weight, embedding_back(dy))

        return y, backward


class Offset(Layer):
    """Adds a learned table (length, d), such as positions, to x (n, l, d) with l ≤ length.

    Called with more tokens it raises ValueError.
    """

    def __init__(self, name: str, length: int, d: int, std: float):
        self.name, self.length, self.d, self.std = name, length, d, std

    def parameters(self) -> dict[str, tuple[Shape, Initialiser]]:
        return {self.name: ((self.length, self.d), normal(self.std))}

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        if x.shape[1] > self.length:
            raise ValueError(f"{self.name}: at most {self.length} tokens, found {x.shape[1]}")
        y, offset_back = F.offset(x, params[self.name])

        def backward(dy, grads):
            dx, dtable = offset_back(dy, weights=wants_grad(grads, self.name))
            add_grad(grads, self.name, dtable)
            return dx

        return y, backward
