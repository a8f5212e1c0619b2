"""The checker of gradients, checked: it sees every kind of fault and does not cry wolf."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import strict
from hypothesis import given
from slow import mostly_slow
from strategies import seeds

from tinyldm.nn.activations import silu
from tinyldm.nn.layers import Linear
from tinyldm.nn.protocol import add_grad
from tinyldm.testing import GradientError, Undecided, check_gradients


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
    assert len(check_gradients(product, [x, y], rng=seed, tol=1e-13)) == 2


@given(seeds)
def test_a_right_layer_passes(seed):
    rng = np.random.default_rng(seed)
    w, b, x = rng.normal(size=(3, 4, 3))
    assert len(check_gradients(scaled, x, {"w": w, "b": b}, rng=seed, tol=1e-13)) == 3


def test_one_input_needs_no_list(x):
    assert len(check_gradients(lambda x: silu(x), x)) == 1


def test_everything_is_done_in_float64(x):
    assert len(check_gradients(product, [x.astype("float32"), x], tol=1e-13)) == 2


@pytest.mark.parametrize("factor", [1, 1.01])
def test_what_knows_float32_alone_is_checked_in_it(x, factor):
    """By differences with error bars: a kernel may round, or refuse float64."""

    def rounds(x):
        y = np.tanh(x.astype("float32"))
        return y, lambda dy: factor * dy * (1 - y * y)

    def refuses(x):
        if x.dtype != "float32":
            raise TypeError(x.dtype)
        return rounds(x)

    for f in (rounds, refuses):
        verdict = pytest.raises(GradientError, match="by 1.01") if factor != 1 else nullcontext()
        with verdict:
            assert len(check_gradients(f, x.astype("float32"))) == 1
    with pytest.raises(TypeError):
        check_gradients(refuses, x)
    with pytest.raises(GradientError, match="output y: float64 inputs must give float64"):
        check_gradients(rounds, x)


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

    assert len(check_gradients(pick, [None, ids, x, chosen])) == 1


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
        assert len(check_gradients(sum_of_softmax, x, rng=seed)) == 1


def test_the_seed_may_be_a_generator(x):
    assert len(check_gradients(product, [x, x + 1], rng=np.random.default_rng(3))) == 2


# ---------------------------------------------------------------------------- what the message says


def test_the_message_names_the_tensor_both_numbers_and_the_cause(x):
    def doubled(x, y):
        return x * y, lambda dz: (y * dz, 2 * x * dz)

    with pytest.raises(GradientError) as error:
        check_gradients(doubled, [x, x + 2])
    message = str(error.value)
    assert message.startswith("y: wrong gradient\n")
    along = r"\(complex step\):\n +forward pass (\S+), backward pass (\S+)\n"
    numeric, ours = map(float, re.search(along, message).groups())
    assert ours == pytest.approx(2 * numeric)
    assert "wrong: 12 of 12 entries" in message and "(×2)" in message
    assert "likely cause: it is multiplied by 2" in message
    assert message.endswith("right: x")
    assert max(map(len, message.splitlines())) <= 80


def test_the_worst_entry_is_shown_with_both_values(x):
    def spoilt(x):
        def backward(dy):
            dx = 2 * x * dy
            dx[1, 2] += 7.5
            return dx

        return x * x, backward

    with pytest.raises(GradientError) as error:
        check_gradients(spoilt, x)
    at, numeric, ours = re.search(
        r"worst is x(\[\d, \d\]):\n +forward pass (\S+), backward pass (\S+)", str(error.value)
    ).groups()
    assert at == "[1, 2]" and float(ours) - float(numeric) == pytest.approx(7.5)
    assert "wrong: 1 of 12 entries" in str(error.value)


def test_all_wrong_tensors_are_named(x, params):
    def wrong(params, x):
        y, backward = scaled(params, x)

        def wrong_back(dy, grads):
            own = {}
            dx = backward(dy, own)
            add_grad(grads, "w", -own["w"])
            add_grad(grads, "b", own["b"])
            return 5 * dx

        return y, wrong_back

    with pytest.raises(GradientError) as error:
        check_gradients(wrong, x, params)
    causes = re.findall(
        r"^(\w+): wrong.*?cause: it is multiplied by (\S+)", str(error.value), re.M | re.S
    )
    assert causes == [("x", "5"), ("w", "−1")]


def test_the_source_of_the_checker_is_not_in_the_traceback(x):
    with pytest.raises(GradientError) as error:
        check_gradients(change(product, lambda g: (g[0], 2 * g[1])), [x, x])
    files = [entry.path.name for entry in error.traceback]
    assert files == ["test_gradcheck.py", "gradcheck.py"] and error.traceback[1].ishidden(error)


# ------------------------------------------------------------------------------ forms of a function


def test_plain_functions_with_a_vjp(x):
    w = np.random.default_rng(1).normal(size=(4, 2))

    def vjp(inputs, dy):
        x, w = inputs
        return dy @ w.T, x.T @ dy

    assert len(check_gradients(lambda x, w: x @ w, [x, w], vjp=vjp)) == 2
    with pytest.raises(GradientError, match="w: wrong gradient"):
        check_gradients(
            lambda x, w: x @ w, [x, w], vjp=lambda i, dy: (vjp(i, dy)[0], -vjp(i, dy)[1])
        )
    assert len(check_gradients(np.sin, x, vjp=lambda x, dy: np.cos(x) * dy)) == 1


def test_nested_inputs_and_outputs(x):
    def f(given, factor, flag, nothing, ids):
        assert flag is True and nothing is None and ids == [1, "text"]
        a, (b, c) = given["a"], given["rest"]
        y = {"sum": a + c, "parts": (a * b, [b.sum() * factor]), "count": 3}

        def backward(dy):
            dab, (df,) = dy["parts"]
            assert dy["count"] is None
            da = dy["sum"] + dab * b
            rest = [dab * a + df * factor, dy["sum"].copy()]
            return {"a": da, "rest": rest}, df * b.sum(), None, None, None

        return y, backward

    given = {"a": x, "rest": (x + 1, x - 1)}
    assert len(check_gradients(f, [given, 2.5, True, None, [1, "text"]])) == 4

    def g(*inputs):
        y, backward = f(*inputs)

        def wrong(dy):
            gradients = backward(dy)
            gradients[0]["rest"][1] *= 2
            return gradients

        return y, wrong

    with pytest.raises(GradientError, match=r"^input 0\['rest'\]\[1\]: wrong gradient"):
        check_gradients(g, [given, 2.5, True, None, [1, "text"]])


def test_numbers_and_lists_of_gradients():
    def f(a, b):
        return a * b, lambda d: [d * b, d * a]

    assert len(check_gradients(f, [2.0, 3.0])) == 2
    with pytest.raises(GradientError, match="a: wrong gradient"):
        check_gradients(lambda a, b: (a * b, lambda d: [2 * d * b, d * a]), [2.0, 3.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: np.zeros((0, 3)), lambda x: np.array(2.0), lambda x: np.asfortranarray(x),
        lambda x: np.tile(x, (2, 2))[::2, 1::2], lambda x: np.broadcast_to(x, (2, 3, 4)),
        lambda x: np.frombuffer(x.tobytes()),
    ],
    ids=["empty", "0-d", "Fortran", "strided", "broadcast", "read-only"],
)  # fmt: skip
def test_arrays_of_any_layout(x, make):
    given = make(x)
    assert len(check_gradients(lambda x: (x * x, lambda dy: 2 * x * dy), given)) == 1
    if given.size:
        with pytest.raises(GradientError, match="by −1"):
            check_gradients(lambda x: (x * x, lambda dy: -2 * x * dy), given)


def test_what_is_no_use_of_it(x):
    with pytest.raises(
        ValueError, match="method: expected one of auto, complex, central, found 'complx'"
    ):
        check_gradients(product, [x, x], method="complx")
    with pytest.raises(TypeError, match="expected f to return .y, backward., or vjp"):
        check_gradients(lambda x: 2 * x, x)
    with pytest.raises(ValueError, match="with vjp, give the parameters among the inputs"):
        check_gradients(scaled, x, {"w": x}, vjp=lambda i, dy: dy)


# ----------------------------------------------------------------------------- what is not accepted


def test_a_missing_gradient(x):
    message = r"inputs: expected 2 gradients \(input 0, input 1\), backward returned 1"
    for dropped in (lambda g: g[0], lambda g: g[:1]):
        with pytest.raises(GradientError, match=message):
            check_gradients(change(product, dropped), [x, x])
    with pytest.raises(GradientError, match="input 1: got no gradient"):
        check_gradients(change(product, lambda g: (g[0], None)), [x, x])

    layer = Linear("a", 4, 2)
    biased = layer.init(np.random.default_rng(0)) | {"c": np.ones(2)}
    with pytest.raises(GradientError, match="c: got no gradient"):
        check_gradients(layer, x, biased)


def test_an_extra_gradient(x, params):
    with pytest.raises(GradientError, match="backward returned 3"):
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

    with pytest.raises(GradientError, match="output y: float64 inputs must give float64"):
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

    for eater in (eats_input, eats_input_later):
        with pytest.raises(GradientError, match="x: the function wrote into it"):
            check_gradients(eater, x.copy())
    with pytest.raises(GradientError, match="dy: the function wrote into it"):
        check_gradients(eats_dy, x)
    with pytest.raises(GradientError, match="b: the function wrote into it"):
        check_gradients(eats_params, x, params)


LOSSY = {  # the imaginary part is lost, in all or in one of two terms
    "absolute": lambda x: (np.abs(x), lambda dy: dy * np.sign(x)),
    "in one term": lambda x: (x + np.abs(x), lambda dy: dy * (1 + np.sign(x))),
    "product": lambda x: (x * np.abs(x), lambda dy: 2 * dy * np.abs(x)),
    "variance": lambda x: (
        np.var(x, keepdims=True), lambda dy: dy * 2 * (x - x.mean()) / x.size),
    "norm": lambda x: (
        x / np.linalg.norm(x),
        lambda dy: (dy - x * (dy * x).sum() / (x * x).sum()) / np.linalg.norm(x)),
    "deviation": lambda x: (x.std(), lambda dy: dy * (x - x.mean()) / (x.size * x.std())),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSY)
def test_a_function_that_loses_the_imaginary_part(x, name):
    f = LOSSY[name]
    assert len(check_gradients(f, x)) == 1
    assert len(check_gradients(f, x, method="central", tol=1e-8)) == 1
    with pytest.raises(GradientError):
        check_gradients(f, x, method="complex")
    with pytest.raises(GradientError, match="by ½"):
        check_gradients(lambda x: (f(x)[0], lambda dy: f(x)[1](dy) / 2), x)


def test_a_wrong_gradient_that_the_complex_step_would_pass(x):
    """The derivative of x |x| is 2 |x|; by the complex step, which loses that of |x|, it is |x|."""

    def wrong(x):
        return x * np.abs(x), lambda dy: dy * np.abs(x)

    assert len(check_gradients(wrong, x, method="complex")) == 1
    with pytest.raises(GradientError, match="x: wrong gradient"):
        check_gradients(wrong, x)


def test_central_differences_see_faults_too(x):
    def wrong(x):
        return np.abs(x), lambda dy: dy * np.sign(x) * 1.001

    with pytest.raises(GradientError, match="x: wrong"):
        check_gradients(wrong, x, method="central", tol=1e-6)


@pytest.mark.parametrize("slope", [-1, -0.3, 0, 1])
def test_at_a_kink_all_between_both_sides_is_right(slope):
    x = np.array([0.0, 1, -1, 2])

    def absolute(x, slope):
        return np.abs(x), lambda dy: dy * np.where(x == 0, slope, np.sign(x))

    assert len(check_gradients(lambda x: absolute(x, slope), x)) == 1
    with pytest.raises(GradientError, match="lies outside of both sides|wrong: 1 of 4"):
        check_gradients(lambda x: absolute(x, 3), x)


def test_what_cannot_be_told_is_said(x):
    def noisy(x):
        return x + 0.01 * np.sin(1e9 * x), lambda dy: dy.copy()

    def nowhere(x):
        return np.where(x == given, x, np.nan) + 0 * np.abs(x), lambda dy: dy.copy()

    given = x
    for f, why in ((noisy, "a kink is near|rounding"), (nowhere, "no step along it gives")):
        with pytest.raises(Undecided, match=f"cannot tell(.|\n)*{why}"):
            check_gradients(f, x, method="central")


def test_large_constants_and_infinity_in_the_output_hide_nothing():
    mask, x = np.array([True, False, True, True]), np.ones(4)
    for hidden in (-np.inf, -1e15):

        def f(x, factor, hidden=hidden):
            return np.where(mask, 3 * x, hidden), lambda dy: np.where(mask, factor * dy, 0)

        assert len(check_gradients(lambda x, f=f: f(x, 3), x)) == 1
        with pytest.raises(GradientError, match="by 4/3"):
            check_gradients(lambda x, f=f: f(x, 4), x)


def test_a_small_gradient_beside_a_large_one_is_checked_as_well(x):
    def f(a, b):
        return 1e14 * a + b, lambda dy: (1e14 * dy, 2 * dy)

    with pytest.raises(GradientError, match="b: wrong gradient"):
        check_gradients(f, [x, x])


def test_random_functions_and_what_a_last_call_left_behind(x):
    rng, last = np.random.default_rng(0), {}

    def drawn(x):
        return x * rng.normal(), lambda dy: dy

    def drawn_in_backward(x):
        return x * 2.0, lambda dy: dy * (2 + rng.normal())

    def stale(x):
        last["x"] = x
        return x * x, lambda dy: 2 * last["x"] * dy

    with pytest.raises(GradientError, match="two calls with the same inputs give two results"):
        check_gradients(drawn, x)
    for f in (drawn_in_backward, stale):
        with pytest.raises(GradientError, match=r"what the last\s+call has left behind"):
            check_gradients(lambda x, f=f: f(x), x)


def test_a_layer_that_overwrites_grads(x, params):
    def overwrites(params, x):
        def backward(dy, grads):
            grads["w"], grads["b"] = dy * x, dy.copy()
            return dy * params["w"]

        return params["w"] * x + params["b"], backward

    with pytest.raises(GradientError, match="overwrites what grads holds"):
        check_gradients(overwrites, x, params)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_are_not_finite(x):
    for spoil in (np.nan, np.inf):
        spoiled = change(product, lambda g, spoil=spoil: (g[0] + spoil, g[1]))
        with pytest.raises(GradientError, match=r"input 0: entry \(0, 0\) of its gradient is"):
            check_gradients(spoiled, [x, x])
        bad = x.copy()
        bad[1, 2] = spoil
        with pytest.raises(GradientError, match=rf"y: entry \(1, 2\) is {spoil}"):
            check_gradients(product, [x, bad])
    with pytest.raises(GradientError, match=r"output y: entry \(0, 1\) is nan"):
        check_gradients(lambda x: (x + np.array([0, np.nan, 0, 0]), lambda dy: dy), x)


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

    assert len(check_gradients(lambda x: square(x, 1), x, rng=seed)) == 1
    for factor in (1.01, 0.99):
        with pytest.raises(GradientError, match="x: wrong gradient"):
            check_gradients(lambda x, factor=factor: square(x, factor), x, rng=seed)


def test_a_factor_is_named_with_every_place_of_its_size():
    def by_rows(q, k, heads):
        return q * k, lambda dy: (k * dy, (q * dy).sum((0, 1)) / heads)

    q, k = np.random.default_rng(0).normal(size=(3, 4, 5)), np.arange(1.0, 6.0)
    with pytest.raises(GradientError) as error:
        check_gradients(by_rows, [q, k, 3])
    assert (
        "it is multiplied by 1/3, and 3 is the size of axis 0 of q and y (the batch), or the input "
        "heads: a sum became a mean, or a mean is taken twice"
    ) in " ".join(str(error.value).split())


def test_a_tensor_of_one_entry_tells_no_cause_but_a_simple_factor():
    for factor, says in ((0.499, "tells no cause: try larger sizes"), (0.5, "multiplied by ½")):
        with pytest.raises(GradientError, match=says):
            check_gradients(lambda x, k=factor: (x * x, lambda dy: k * 2 * x * dy), np.ones(1))


def test_what_a_layer_has_left_behind_is_named():
    class Keeps:
        def __call__(self, params, x):
            self.x = x
            return params["w"] * x, self.backward

        def backward(self, dy, grads):
            grads["w"] = grads.get("w", 0) + (self.x * dy).sum()
            return dy

    with pytest.raises(GradientError) as error:
        check_gradients(Keeps(), [np.arange(1.0, 4.0)], {"w": np.ones(())})
    assert "which uses what the last call has left behind in x" in " ".join(
        str(error.value).split()
    )


# ----------------------------------------------------- small terms, many kinks, what is left behind


@pytest.mark.parametrize("weight", [1e-2, 1e-4, 1e-6, 1e-8])
def test_a_small_term_that_the_complex_step_does_not_see_is_confirmed_by_itself(x, weight):
    """NumPy's norm loses the imaginary part: beside the large term nothing showed that."""

    def f(times):
        def loss(w, g):
            norm = np.linalg.norm(g)

            def backward(dy):
                return dy * 2 * w / w.size, dy * times * weight * g / norm

            return (w * w).mean() + weight * norm, backward

        return loss

    inputs = [x, np.array([0.5, -1.0, 2.0])]
    check_gradients(f(1.0), inputs)
    for times in (0.0, 0.5, -1.0):
        with pytest.raises(GradientError, match="g: wrong gradient"):
            check_gradients(f(times), inputs)


@pytest.mark.parametrize("times", [2.0, 1.01, 0.5, -1.0])
def test_many_kinks_at_once_hide_no_wrong_entry(times):
    """Along a direction through them nearly everything lies between the two sides."""
    x = np.maximum(np.random.default_rng(1).normal(size=(4, 5)), 0)

    def relu(times):
        return lambda x: (np.maximum(x, 0), lambda dy: times * dy * (x > 0))

    check_gradients(relu(1.0), x)
    with pytest.raises(GradientError, match="x: wrong gradient"):
        check_gradients(relu(times), x)


def test_too_many_kinks_to_look_at_each_are_undecided():
    x = np.maximum(np.random.default_rng(1).normal(size=(40, 50)), 0)
    with pytest.raises(Undecided, match="outputs have a kink here: move the inputs"):
        check_gradients(lambda x: (np.maximum(x, 0), lambda dy: dy * (x > 0)), x)


@pytest.mark.parametrize(
    "left, of",
    [("mask", lambda x: x > 0), ("sign", np.sign), ("largest", lambda x: x == x.max())],
)
def test_what_a_call_leaves_behind_is_seen_where_it_hangs_on_signs_or_order(left, of):
    class Layer:
        def __call__(self, x):
            setattr(self, left, of(x))
            return x * of(x), lambda dy: dy * getattr(self, left)

    x = np.random.default_rng(1).normal(size=(4, 5))
    with pytest.raises(GradientError, match="stale") as caught:
        check_gradients(Layer(), x)
    assert left in str(caught.value)


def test_a_function_that_rounds_on_its_own_is_no_wrong_gradient():
    x = np.random.default_rng(1).normal(size=(4, 5))
    with pytest.raises(Undecided, match="rounding hides the derivative"):
        check_gradients(
            lambda x: (np.sin(x.astype("f4")).astype(x.dtype), lambda dy: np.cos(x) * dy), x
        )


@pytest.mark.parametrize("near", [1e-7, 1e-8, 1e-9])
def test_an_entry_very_near_to_a_kink_is_undecided(near):
    x = np.random.default_rng(1).normal(size=(4, 5))
    x[0, 0] = near
    with pytest.raises(Undecided, match="a kink is near"):
        check_gradients(lambda x: (np.abs(x), lambda dy: np.sign(x) * dy), x)


def test_what_is_written_on_a_device_is_seen():
    def f(x):
        x += 1.0
        return x * x * 0.5, lambda dy: dy * x

    with pytest.raises(GradientError, match="the function wrote into it"):
        check_gradients(f, strict.asarray(np.random.default_rng(1).normal(size=(4, 5))))


def test_a_lost_imaginary_part_names_no_wrong_cause():
    """By the complex step a layer norm without its second term looked like J dy."""

    def f(x):
        std = x.std(axis=1, keepdims=True)
        x_hat = (x - x.mean(axis=1, keepdims=True)) / std
        return x_hat, lambda dy: (dy - dy.mean(axis=1, keepdims=True)) / std

    with pytest.raises(GradientError, match="wrong gradient") as caught:
        check_gradients(f, np.random.default_rng(1).normal(size=(4, 5)))
    assert "is wanted" not in str(caught.value)
