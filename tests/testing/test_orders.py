"""Adjoints, Jacobians, Hessians, Taylor's remainder, live parameters: of right and wrong ones."""

import math
from functools import partial

import numpy as np
import pytest
import strict
from hypothesis import given
from hypothesis import strategies as st
from strategies import EVERYTHING, method_for, seeds

from tinyldm.nn.layers import Linear
from tinyldm.nn.protocol import add_grad
from tinyldm.testing import (
    GradientError,
    check_jacobian,
    check_linear,
    check_live,
    check_second_order,
    check_taylor,
)

DERIVED = [name for name in EVERYTHING if method_for(name) == "auto"]
LINEAR = {  # → which arguments the function is linear in
    "linear": ["x"], "conv2d": ["x"], "upsample_nearest": ["x"], "mean": ["x"],
    "concatenate": None, "attention": ["v"],
}  # fmt: skip


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(0.3, 1, (3, 4))


def cube(x, factor=1.0):
    return x**3, lambda dy: factor * 3 * x * x * dy


# ------------------------------------------------------------------------ on the functions of `nn`


@pytest.mark.parametrize("name", LINEAR)
@given(data=st.data())
def test_linear_maps(name, data):
    call = data.draw(EVERYTHING[name])
    arrays = dict(zip(call.shapes, call.arrays(), strict=True))
    moved = LINEAR[name] or list(arrays)
    fixed = {key: 0 * a if key == "b" else a for key, a in arrays.items()}

    def f(*inputs):
        y, backward = call(*(fixed | dict(zip(moved, inputs, strict=True))).values())

        def back(dy):
            gradients = backward(dy)
            gradients = gradients if isinstance(gradients, (tuple, list)) else (gradients,)
            return tuple(dx for key, dx in zip(arrays, gradients, strict=False) if key in moved)

        return y, back

    assert check_linear(f, [arrays[key] for key in moved], rng=call.seed) <= 1e-12


@pytest.mark.parametrize("name", DERIVED)
@given(data=st.data())
def test_taylors_remainder(name, data):
    call = data.draw(EVERYTHING[name])
    assert check_taylor(call, call.arrays(), rng=call.seed) >= 1.9


@pytest.mark.parametrize("name", DERIVED)
@given(data=st.data())
def test_hessians_are_symmetric(name, data):
    call = data.draw(EVERYTHING[name])
    assert check_second_order(call, call.arrays(), rng=call.seed) <= 1e-9


@pytest.mark.parametrize("name", DERIVED)
@given(data=st.data())
def test_jacobians(name, data):
    call = data.draw(EVERYTHING[name])
    arrays = call.arrays()
    if sum(a.size for a in arrays) <= 60:
        assert check_jacobian(call, arrays) <= 1e-9


# ------------------------------------------------------------------------- what each of them finds


def test_what_is_not_linear_and_what_is_not_the_adjoint(x):
    w = np.random.default_rng(1).normal(size=(4, 4))
    assert check_linear(lambda x: (x @ w, lambda dy: dy @ w.T), x) <= 1e-12
    with pytest.raises(GradientError, match="x: not the adjoint"):
        check_linear(lambda x: (x @ w, lambda dy: dy @ w), x)
    with pytest.raises(GradientError, match="not linear: of zeros it is not zero"):
        check_linear(lambda x: (x @ w + 1, lambda dy: dy @ w.T), x)
    with pytest.raises(GradientError, match="not linear: f.2u . 3v. is not"):
        check_linear(cube, x)


def test_the_entry_of_a_jacobian_is_named(x):
    def spoilt(x):
        y, backward = cube(x)

        def back(dy):
            dx = backward(dy)
            dx[1, 2] += 0.5 * dy[0, 3]
            return dx

        return y, back

    assert check_jacobian(cube, x) <= 1e-15
    with pytest.raises(GradientError) as error:
        check_jacobian(spoilt, x)
    assert str(error.value) == (
        "wrong Jacobian in 1 of 144 entries\n  the worst is ∂y[0, 3] / ∂x[1, 2]:\n"
        "    forward pass 0, backward pass 0.5"
    )


def test_a_backward_pass_that_is_no_gradient_has_no_symmetric_hessian(x):
    def product_of_neighbours(x, lost=0.0):
        y = x * np.roll(x, 1)
        return y, lambda dy: dy * np.roll(x, 1) + (1 - lost) * np.roll(dy * x, -1)

    assert check_second_order(product_of_neighbours, x) <= 1e-12
    with pytest.raises(GradientError, match="the Hessian is not symmetric"):
        check_second_order(lambda x: product_of_neighbours(x, lost=0.1), x)


@pytest.mark.parametrize("check", [check_linear, check_jacobian, check_taylor])
def test_their_source_is_not_in_the_traceback(check, x):
    with pytest.raises(GradientError) as error:
        check(lambda x: (x + np.nan, lambda dy: dy), x)
    shown = [entry.path.name for entry in error.traceback if not entry.ishidden(error)]
    assert shown == ["test_orders.py"]


def test_the_slope_of_taylors_remainder(x):
    assert check_taylor(cube, x) == pytest.approx(2, abs=0.02)
    assert check_taylor(lambda x: (2 * x, lambda dy: 2 * dy), x) == math.inf
    with pytest.raises(GradientError, match=r"to the power\s+[01]\."):
        check_taylor(lambda x: cube(x, factor=1.01), x)


@given(seed=seeds)
def test_every_parameter_of_a_layer_is_live(seed):
    layer = Linear("a", 4, 2)
    params = layer.init(np.random.default_rng(0))
    x = np.random.default_rng(seed).normal(size=(3, 4))
    assert check_live(layer, x, params, rng=seed) == 2

    def dead(params, x):
        y, backward = layer({name: params[name] for name in ("a.weight", "a.bias")}, x)

        def back(dy, grads):
            add_grad(grads, "unused", np.zeros(3))
            return backward(dy, grads)

        return y, back

    with pytest.raises(GradientError, match="unused: the gradient is zero everywhere"):
        check_live(dead, x, params | {"unused": np.ones(3)}, rng=seed)


# ------------------------------------------------------- what a large or a lost number could hide


def hidden(times, value):
    """Squares, with some entries masked by a large number; the gradient is `times` too large."""

    def f(x):
        seen = x > 0
        return np.where(seen, x * x, value), lambda dy: np.where(seen, 2 * times * x * dy, 0)

    return f


def small_beside_large(times):
    return lambda a, b: (1e14 * a + b, lambda dy: (1e14 * dy, times * dy))


def lost(times):
    """x |x|: NumPy's `abs` loses the imaginary part, so the complex step sees half of it."""
    return lambda x: (x * abs(x), lambda dy: 2 * times * abs(x) * dy)


X = np.random.default_rng(1).normal(size=(4, 5))


@pytest.mark.parametrize(
    "check, make, inputs",
    [
        *((check_jacobian, partial(hidden, value=value), [X]) for value in (-1e15, -np.inf)),
        *((check_taylor, partial(hidden, value=value), [X]) for value in (-1e9, -np.inf)),
        (check_linear, small_beside_large, [X, X]),
        (check_jacobian, small_beside_large, [X, X]),
        (check_jacobian, lost, [X]),
    ],
)
def test_nothing_is_hidden_by_a_large_or_a_lost_number(check, make, inputs):
    check(make(times=1), inputs)
    for times in (1.01, 0.5):
        with pytest.raises(GradientError):
            check(make(times=times), inputs)


def test_a_hessian_where_imaginary_parts_are_lost():
    def f(times):
        return lambda x, z: (
            abs(x) * x * z,
            lambda dy: (2 * times * abs(x) * z * dy, x * abs(x) * dy),
        )

    check_second_order(f(1), [X, X + 1])
    with pytest.raises(GradientError, match="not symmetric"):
        check_second_order(f(0.9), [X, X + 1])


def test_instruments_take_functions_of_float32():
    def f(x):
        x = x.astype("f4")
        return x * x, lambda dy: 2 * dy * x

    check_jacobian(f, X.astype("f4"))
    check_taylor(f, X.astype("f4"))


def test_rounding_in_the_place_of_zero_is_no_wrong_jacobian():
    """A bias that softmax takes away has the derivative 0, but for the last bits."""

    def f(b):
        e = np.exp(X + b)
        p = e / e.sum(axis=1, keepdims=True)
        return p, lambda dy: (p * (dy - (p * dy).sum(1, keepdims=True))).sum(1, keepdims=True)

    check_jacobian(f, X[:, :1])


def test_parameters_on_a_device_and_integers_are_taken_as_they_are():
    def layer(params, x):
        w = params["w"]

        def backward(dy, grads):
            add_grad(grads, "w", (dy * x).sum(axis=0))
            return dy * w

        return x * w, backward

    x, w = strict.asarray(X), strict.asarray(X[0])
    assert check_live(layer, x, {"w": w, "size": 5}) == 1
