"""Planted faults are all detected by a real check, and named where a test checks too little."""

from pathlib import Path

import numpy as np
import pytest

from tinyldm.testing import assert_detects_faults, check_gradients
from tinyldm.testing.faults import faulty_copies


def normalised(x, gain, eps=1e-5):
    """A layer norm, written out."""
    n = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    y = centred / deviation

    def backward(dy):
        dgain = np.einsum("abc,abc->c", dy, y)
        dy = dy * gain
        dx = dy - dy.sum(-1, keepdims=True) / n - y * (dy * y).sum(-1, keepdims=True) / n
        return dx / deviation, dgain

    return y * gain, backward


def linear(x, w, b):
    def backward(dy):
        return dy @ w.T, x.T @ dy, dy.sum(axis=0)

    return x @ w + b, backward


RNG = np.random.default_rng(0)
INPUTS = {
    normalised: [RNG.normal(size=(2, 3, 5)), RNG.normal(size=5)],
    linear: [RNG.normal(size=(3, 4)), RNG.normal(size=(4, 4)), RNG.normal(size=4)],
}


@pytest.mark.parametrize("f", INPUTS, ids=lambda f: f.__name__)
def test_every_fault_is_detected(f):
    assert assert_detects_faults(f, lambda f: check_gradients(f, INPUTS[f_of(f)])) >= 5


def f_of(f):
    return next(known for known in INPUTS if known.__name__ == f.__name__)


def test_a_test_that_checks_too_little_is_told_what_survives():
    def looks_at_shapes(f):
        x, w, b = INPUTS[linear]
        y, backward = f(x, w, b)
        assert [g.shape for g in backward(np.ones_like(y))] == [x.shape, w.shape, b.shape]

    with pytest.raises(AssertionError) as error:
        assert_detects_faults(linear, looks_at_shapes)
    message = str(error.value)
    assert "faults planted in linear are not detected" in message
    assert "w.T  →  w" in message and "dy.sum(axis=0)  →  dy.mean(axis=0)" in message
    line = int(message.split("line ")[1].split(":")[0])
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert "return dy @ w.T" in source[line - 1]


def test_functions_in_functions_with_defaults_and_variables_around_them():
    factor = 3.0

    def scaled(x, power=3):
        return factor * x**power, lambda dy: factor * power * x ** (power - 1) * dy

    x = np.array([0.5, -1.5, 2.0])
    assert assert_detects_faults(scaled, lambda f: check_gradients(f, x)) >= 5
    changes = [str(planted) for planted, _ in faulty_copies(scaled)]
    assert len(set(changes)) == len(changes)


def test_what_has_no_backward_pass_inside():
    def flat(x):
        return x, None

    with pytest.raises(ValueError, match="flat: no backward pass"):
        assert_detects_faults(flat, lambda f: None)
    with pytest.raises(pytest.fail.Exception, match="it was wrong before"):
        assert_detects_faults(linear, lambda f: pytest.fail("it was wrong before"))


class Scaled:
    """A layer whose call has the backward pass."""

    def __call__(self, params, x):
        w = params["w"]

        def backward(dy, grads):
            grads["w"] = grads.get("w", 0) + (dy * x).sum(axis=(0, 1))
            return w * dy

        return w * x, backward


def test_the_faults_of_a_layer():
    x, w = RNG.normal(size=(2, 3, 5)), RNG.normal(size=5)
    layer = Scaled()
    assert assert_detects_faults(layer, lambda f: check_gradients(f, [x], {"w": w})) >= 5
    with pytest.raises(ValueError, match="Scaled: expected a function written with def, or a"):
        assert_detects_faults(Scaled, lambda f: None)


def test_what_is_known_to_be_no_fault():
    def doubled(x):
        def backward(dy):
            return (2 + 0 * x) * dy

        return 2 * x, backward

    x = RNG.normal(size=3)
    with pytest.raises(AssertionError, match=r"0 \* x  →  0") as error:
        assert_detects_faults(doubled, lambda f: check_gradients(f, x))
    survivors = [line.partition(": ")[2] for line in str(error.value).splitlines()[1:]]
    assert assert_detects_faults(doubled, lambda f: check_gradients(f, x), survivors) >= 3


def test_a_faulty_copy_has_the_lines_of_the_file():
    first = linear.__code__.co_firstlineno
    for planted, faulty in faulty_copies(linear):
        assert faulty.__code__.co_firstlineno == first
        assert first < planted.line < first + 4
