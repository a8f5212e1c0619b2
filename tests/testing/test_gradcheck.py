"""The checker of gradients, checked: it sees every kind of fault and does not cry wolf."""

import re

import numpy as np
import pytest
from hypothesis import given
from slow import mostly_slow
from strategies import seeds

from tinyldm.nn.activations import silu
from tinyldm.nn.layers import Linear
from tinyldm.nn.norms import layer_norm
from tinyldm.nn.protocol import add_grad
from tinyldm.testing import GradientError, check_gradients


def product(x, y):
    """Right, and with every ingredient of the functions in the library."""

    def backward(dz):
        return y * dz, x * dz

    return x * y, backward


def scaled(params, x):
    """A layer that is right: y = w x + b."""

    def backward(dy, grads):
        add_grad(grads, "w", dy * x)
        add_grad(grads, "b", dy.copy())
        return dy * params["w"]

    return params["w"] * x + params["b"], backward


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(1, 1, (3, 4))


@pytest.fixture
def params(x):
    return {"w": x[::-1].copy(), "b": x * x}


def change(f, of_gradients):
    """`f` with the gradients that it returns changed."""

    def changed(*inputs):
        y, backward = f(*inputs)
        return y, lambda *args: of_gradients(backward(*args))

    return changed


# --------------------------------------------------------------------------------- what is accepted


@given(seeds)
def test_a_right_function_passes(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 4, 3))
    assert check_gradients(product, [x, y], rng=seed, tol=1e-13) == 2


@given(seeds)
def test_a_right_layer_passes(seed):
    rng = np.random.default_rng(seed)
    w, b, x = rng.normal(size=(3, 4, 3))
    assert check_gradients(scaled, x, {"w": w, "b": b}, rng=seed, tol=1e-13) == 3


def test_one_input_needs_no_list(x):
    assert check_gradients(lambda x: silu(x), x) == 1


def test_everything_is_done_in_float64(x):
    assert check_gradients(product, [x.astype("float32"), x], tol=1e-13) == 2


def test_inputs_without_a_gradient_are_passed_through(x):
    ids = np.array([2, 0])
    chosen = np.array([True, False])

    def pick(nothing, ids, x, chosen):
        assert nothing is None and ids.dtype.kind == "i" and chosen.dtype.kind == "b"

        def backward(dy):
            dx = np.zeros_like(x)
            dx[ids[chosen]] = dy
            return None, None, dx, None

        return x[ids[chosen]], backward

    assert check_gradients(pick, [None, ids, x, chosen]) == 1


def test_a_derivative_that_is_zero_by_mathematics_passes(x):
    # Each row of a softmax sums to one, so this sum does not depend on x: both sides are rounding.
    def sum_of_softmax(x):
        e = np.exp(x)
        p = e / e.sum(axis=1, keepdims=True)

        def backward(dy):
            dp = np.broadcast_to(dy[:, None], p.shape)
            return p * (dp - (p * dp).sum(axis=1, keepdims=True))

        return p.sum(axis=1), backward

    for seed in range(20):
        assert check_gradients(sum_of_softmax, x, rng=seed) == 1


def test_the_seed_may_be_a_generator(x):
    assert check_gradients(product, [x, x + 1], rng=np.random.default_rng(3)) == 2


# ---------------------------------------------------------------------------- what the message says


def test_the_message_names_the_tensor_and_both_numbers(x, params):
    doubled = change(product, lambda gradients: (gradients[0], 2 * gradients[1]))
    with pytest.raises(GradientError) as error:
        check_gradients(doubled, [x, x + 2])
    found = re.match(
        r"input 1: derivative along a random direction is (\S+), the backward pass says (\S+) "
        r"\(mismatch (\S+) of the terms, tol 1e-10\)",
        str(error.value),
    )
    right, ours, _ = map(float, found.groups())
    assert ours == pytest.approx(2 * right, rel=1e-12)

    def wrong(params, x):
        y, backward = scaled(params, x)

        def wrong_back(dy, grads):
            dx = backward(dy, grads)
            grads["w"] = -grads["w"]
            return dx

        return y, wrong_back

    with pytest.raises(GradientError, match=r"^w: derivative along a random direction is"):
        check_gradients(wrong, x, params)


# ----------------------------------------------------------------------------- what is not accepted


def test_a_missing_gradient(x):
    message = "inputs: 2 of them have a gradient, backward returned 1"
    for dropped in (lambda g: g[0], lambda g: (g[0], None), lambda g: g[:1]):
        with pytest.raises(GradientError, match=message):
            check_gradients(change(product, dropped), [x, x])

    layer = Linear("a", 4, 2)
    biased = layer.init(np.random.default_rng(0)) | {"c": np.ones(2)}
    with pytest.raises(GradientError, match="c: got no gradient"):
        check_gradients(layer, x, biased)


def test_an_extra_gradient(x, params):
    with pytest.raises(GradientError, match="2 of them have a gradient, backward returned 3"):
        check_gradients(change(product, lambda g: (*g, x)), [x, x])

    def inventive(params, x):
        y, backward = scaled(params, x)

        def inventive_back(dy, grads):
            add_grad(grads, "weight", dy)
            return backward(dy, grads)

        return y, inventive_back

    with pytest.raises(GradientError, match="weight: got a gradient, but there is no such"):
        check_gradients(inventive, x, params)


@pytest.mark.parametrize(
    "change_of_dx, message",
    [
        (lambda dx: dx.T, r"gradient of shape \(4, 3\) float64, expected \(3, 4\) float64"),
        (lambda dx: dx[None], r"gradient of shape \(1, 3, 4\)"),
        (lambda dx: dx[:1], r"gradient of shape \(1, 4\)"),  # would broadcast
        (lambda dx: dx.sum(), r"gradient of shape \(\)"),
        (lambda dx: dx.astype("float32"), r"gradient of shape \(3, 4\) float32"),
        (lambda dx: dx + 0j, r"gradient of shape \(3, 4\) complex128"),
    ],
)
def test_a_gradient_of_another_shape_or_dtype(x, change_of_dx, message):
    misshapen = change(product, lambda g: (change_of_dx(g[0]), g[1]))
    with pytest.raises(GradientError, match=f"^input 0: {message}"):
        check_gradients(misshapen, [x, x])


def test_an_output_of_another_dtype(x):
    def lossy(x):
        return x.astype("float32"), lambda dy: dy

    with pytest.raises(GradientError, match="output: float64 inputs must give float64"):
        check_gradients(lossy, x)


def test_writing_into_an_input_a_parameter_or_dy(x, params):
    def eats_input(x):
        x *= 2
        return x.copy(), lambda dy: dy

    def eats_input_later(x):
        def backward(dy):
            x[0] = 0
            return dy.copy()

        return x.copy(), backward

    def eats_dy(x):
        def backward(dy):
            dy *= 2
            return dy

        return 2 * x, backward

    def eats_params(params, x):
        y, backward = scaled(params, x)
        params["b"] += 1
        return y, backward

    for eater, victim in [(eats_input, 0), (eats_input_later, 0)]:
        with pytest.raises(GradientError, match=f"input {victim}: the function wrote into it"):
            check_gradients(eater, x.copy())
    with pytest.raises(GradientError, match="dy: the function wrote into it"):
        check_gradients(eats_dy, x)
    with pytest.raises(GradientError, match="b: the function wrote into it"):
        check_gradients(eats_params, x, params)


def test_a_function_that_loses_the_imaginary_part(x):
    def absolute(x):
        return np.abs(x), lambda dy: dy * np.sign(x)

    def halved(x):  # the imaginary part is lost in one of two terms
        return x + np.abs(x), lambda dy: dy * (1 + np.sign(x))

    def variance(x):
        return np.var(x, keepdims=True), lambda dy: dy * 2 * (x - x.mean()) / x.size

    def standardised(x):
        y, backward = layer_norm(x.reshape(1, -1), np.ones(x.size), np.zeros(x.size), 0.0)
        y = ((x - x.mean()) / np.std(x)).reshape(1, -1)
        return y, lambda dy: backward(dy)[0].reshape(x.shape)

    for lost in (absolute, variance):
        with pytest.raises(GradientError, match="input 0: the function turned complex numbers"):
            check_gradients(lost, x)
    for lost in (halved, standardised):
        with pytest.raises(GradientError, match="input 0: derivative along a random direction"):
            check_gradients(lost, x)
    # The gradients were right: a difference, which does not need complex numbers, says so.
    for right in (absolute, halved, variance, standardised):
        assert check_gradients(right, x, method="central", tol=1e-8) == 1


def test_central_differences_see_faults_too(x):
    def wrong(x):
        return np.abs(x), lambda dy: dy * np.sign(x) * 1.001

    with pytest.raises(GradientError, match="input 0"):
        check_gradients(wrong, x, method="central", tol=1e-6)


def test_nan_is_not_a_gradient(x):
    for spoil in (np.nan, np.inf):
        spoiled = change(product, lambda g, spoil=spoil: (g[0] + spoil, g[1]))
        with pytest.raises(GradientError, match="input 0"), np.errstate(invalid="ignore"):
            check_gradients(spoiled, [x, x])


@pytest.mark.parametrize("seed", mostly_slow(range(20), 0, 1, 2))
def test_one_entry_of_a_million_that_is_one_percent_wrong(seed):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.5, 1.5, 1_000_000) * rng.choice([-1, 1], 1_000_000)
    wrong = rng.integers(x.size)

    def square(x, factor):
        def backward(dy):
            dx = dy * x
            dx *= 2
            dx[wrong] *= factor
            return dx

        return x * x, backward

    assert check_gradients(lambda x: square(x, 1), x, rng=seed) == 1
    for factor in (1.01, 0.99):
        with pytest.raises(GradientError, match="input 0: derivative along a random direction"):
            check_gradients(lambda x, factor=factor: square(x, factor), x, rng=seed)
