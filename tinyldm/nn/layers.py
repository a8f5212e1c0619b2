"""Layers: the functions of this package with named parameters and initial values.

A layer remembers sizes and names, never activations. Its parameters live in a dict that the caller
owns, under the names of the checkpoint, so to save, load, cast, average or move a model is a dict
comprehension.
"""

import math

from tinyldm.nn import functional as F
from tinyldm.nn.conv import conv2d
from tinyldm.nn.protocol import add_grad, wants


class Layer:
    """Anything with parameters: `layer(params, *inputs) → (y, backward)`.

    A leaf overrides `parameters`; the parameters of everything else are those of its attributes.
    """

    def parameters(self):
        """{name: (shape in memory, initialiser)}, children in the order of construction."""
        merged = {}
        for value in vars(self).values():
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, Layer):
                    merged.update(child.parameters())
        return merged

    def shapes(self):
        """{name: shape}: what a checkpoint of this layer must hold (4-D as kh, kw, c_in, c_out)."""
        return {name: shape for name, (shape, _) in self.parameters().items()}

    def init(self, rng):
        """Fresh parameters {name: float32 array} drawn from `rng`, a numpy.random.Generator."""
        return {
            name: initialise(rng, shape).astype("float32")
            for name, (shape, initialise) in self.parameters().items()
        }


# ------------------------------------------------------------------------------------ initialisers


def uniform_fan_in(fan_in):
    """U(±1/√fan_in), of weights and biases: activations keep about their size (LeCun et al. 1998).

    Biases matter in a U-Net: with all of them zero, zero padding leaves no trace in the features,
    and the network is slow to find out where in the picture it is.
    """
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape: rng.uniform(-bound, bound, shape)


def normal(std):
    return lambda rng, shape: rng.normal(0, std, shape)


def zeros(rng, shape):
    return rng.uniform(0, 0, shape)


def ones(rng, shape):
    return zeros(rng, shape) + 1


# ------------------------------------------------------------------------------------------ layers


def named(functional_back, weight, bias=None):
    """Give names to the weight gradients of a function's backward pass."""

    def backward(dy, grads):
        dx, dw, db = functional_back(dy, weights=wants(grads, weight, bias))
        add_grad(grads, weight, dw)
        if bias is not None:
            add_grad(grads, bias, db)
        return dx

    return backward


class Linear(Layer):
    """x (..., d_in) → (..., d_out)."""

    def __init__(self, name, d_in, d_out, bias=True, init=None):
        self.weight, self.bias = f"{name}.weight", f"{name}.bias" if bias else None
        self.d_in, self.d_out = d_in, d_out
        self.initialise = init or uniform_fan_in(d_in)

    def parameters(self):
        weight = {self.weight: ((self.d_out, self.d_in), self.initialise)}
        return weight | ({self.bias: ((self.d_out,), self.initialise)} if self.bias else {})

    def __call__(self, params, x):
        y, linear_back = F.linear(x, params[self.weight], params[self.bias] if self.bias else None)
        return y, named(linear_back, self.weight, self.bias)


class Conv2d(Layer):
    """x (n, h, w, c_in) → (n, h', w', c_out)."""

    def __init__(self, name, c_in, c_out, kernel=3, stride=1, padding=None, init=None):
        self.weight, self.bias = f"{name}.weight", f"{name}.bias"
        self.shape = (kernel, kernel, c_in, c_out)
        self.stride, self.padding = stride, kernel // 2 if padding is None else padding
        self.initialise = init or uniform_fan_in(kernel * kernel * c_in)

    def parameters(self):
        bias = ((self.shape[3],), self.initialise)
        return {self.weight: (self.shape, self.initialise), self.bias: bias}

    def __call__(self, params, x):
        y, conv_back = conv2d(x, params[self.weight], params[self.bias], self.stride, self.padding)
        return y, named(conv_back, self.weight, self.bias)


class GroupNorm(Layer):
    """x (n, ..., c) → the same shape; with `silu`, the activation too."""

    def __init__(self, name, c, groups, eps, silu=False):
        if c % groups:
            raise ValueError(f"{name}: {c} channels do not divide into {groups} groups")
        self.weight, self.bias, self.c = f"{name}.weight", f"{name}.bias", c
        self.groups, self.eps, self.silu = groups, eps, silu

    def parameters(self):
        return {self.weight: ((self.c,), ones), self.bias: ((self.c,), zeros)}

    def __call__(self, params, x):
        w, b = params[self.weight], params[self.bias]
        y, norm_back = F.group_norm(x, w, b, self.groups, self.eps, self.silu)
        return y, named(norm_back, self.weight, self.bias)


class LayerNorm(Layer):
    """x (..., d) → the same shape."""

    def __init__(self, name, d, eps=1e-5):
        self.weight, self.bias, self.d, self.eps = f"{name}.weight", f"{name}.bias", d, eps

    def parameters(self):
        return {self.weight: ((self.d,), ones), self.bias: ((self.d,), zeros)}

    def __call__(self, params, x):
        y, norm_back = F.layer_norm(x, params[self.weight], params[self.bias], self.eps)
        return y, named(norm_back, self.weight, self.bias)


class Embedding(Layer):
    """Whole numbers (...) → (..., d). Its backward pass returns None: numbers have no gradient."""

    def __init__(self, name, count, d, std=1.0):
        self.weight, self.shape, self.std = f"{name}.weight", (count, d), std

    def parameters(self):
        return {self.weight: (self.shape, normal(self.std))}

    def __call__(self, params, ids):
        y, embedding_back = F.embedding(params[self.weight], ids)

        def backward(dy, grads):
            if wants(grads, self.weight):
                add_grad(grads, self.weight, embedding_back(dy))

        return y, backward


class Offset(Layer):
    """Adds a learned table (length, d), such as positions, to x (n, l, d) with l ≤ length."""

    def __init__(self, name, length, d, std):
        self.name, self.length, self.d, self.std = name, length, d, std

    def parameters(self):
        return {self.name: ((self.length, self.d), normal(self.std))}

    def __call__(self, params, x):
        if x.shape[1] > self.length:
            raise ValueError(f"{self.name}: at most {self.length} tokens, found {x.shape[1]}")
        y, offset_back = F.offset(x, params[self.name])

        def backward(dy, grads):
            dx, dtable = offset_back(dy, weights=wants(grads, self.name))
            add_grad(grads, self.name, dtable)
            return dx

        return y, backward
