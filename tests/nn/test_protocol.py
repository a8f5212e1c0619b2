"""The contract between a forward pass and its backward pass, line by line, for every function."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from gradients import check
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_near
from strategies import EVERYTHING, FUNCTIONS, LAYOUTS, random_array, random_params, seeds

from tinyldm.nn import Grads, no_grad, recompute
from tinyldm.nn import functional as F
from tinyldm.nn.activations import silu
from tinyldm.nn.layers import Conv2d, GroupNorm, Layer, Linear
from tinyldm.nn.protocol import add_grad, differentiable, wants_grad
from tinyldm.threads import map_threads

every_function = pytest.mark.parametrize("name", EVERYTHING)


def random_dy(call, y):
    return random_array(np.random.default_rng(call.seed + 1), y.shape, y.dtype)


def as_tuple(gradients):
    return gradients if isinstance(gradients, tuple) else (gradients,)


def same_bits(a, b):
    return a is b is None or (a.dtype == b.dtype and np.array_equal(a, b))


# -------------------------------------------------------------------------- the backward pass: once


@every_function
@given(data=st.data())
def test_a_backward_pass_runs_once(name, data):
    call = data.draw(EVERYTHING[name])
    y, backward = call(*call.arrays())
    backward(random_dy(call, y))
    with pytest.raises(RuntimeError, match=f"{name} was called a second time"):
        backward(random_dy(call, y))


@every_function
@given(data=st.data())
def test_a_backward_pass_frees_what_it_kept(name, data):
    call = data.draw(EVERYTHING[name])
    inputs = call.arrays()
    kept = [weakref.ref(x) for x in inputs]
    y, backward = call(*inputs)
    dy = random_dy(call, y)
    del inputs, y
    backward(dy)
    assert not any(ref() is not None for ref in kept)


def test_it_was_alive_before():
    x, w = np.ones((2, 3)), np.ones((4, 3))
    kept = weakref.ref(x)
    y, backward = F.linear(x, w)
    del x
    assert kept() is not None
    backward(y)
    assert kept() is None


def test_a_backward_pass_that_fails_has_run():
    @differentiable
    def broken(x):
        def backward(dy):
            raise ZeroDivisionError

        return x, backward

    _, backward = broken(np.ones(1))
    with pytest.raises(ZeroDivisionError):
        backward(np.ones(1))
    with pytest.raises(RuntimeError, match="broken was called a second time"):
        backward(np.ones(1))


# ---------------------------------------------------------------------------- nothing is written to


@every_function
@given(data=st.data())
def test_arguments_may_be_read_only(name, data):
    call = data.draw(EVERYTHING[name])
    expected, expected_back = call(*call.arrays())
    inputs, dy = call.arrays(), np.asarray(random_dy(call, expected))
    for array in (*inputs, dy):
        array.flags.writeable = False
    y, backward = call(*inputs)
    assert same_bits(y, expected)
    for dx, dx_expected in zip(as_tuple(backward(dy)), as_tuple(expected_back(dy)), strict=True):
        assert same_bits(dx, dx_expected)


@every_function
@given(data=st.data())
def test_a_result_is_new_memory(name, data):
    # So the caller may go on in place, as y += x does in a residual block.
    call = data.draw(EVERYTHING[name])
    inputs = call.arrays()
    y, _ = call(*inputs)
    assert not any(np.shares_memory(y, x) for x in inputs)


@every_function
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_the_layout_in_memory_does_not_matter(name, layout, data):
    call, rearrange = data.draw(EVERYTHING[name]), LAYOUTS[layout]
    expected, expected_back = call(*call.arrays())
    y, backward = call(*(rearrange(x) for x in call.arrays()))
    dy = np.asarray(random_dy(call, expected))
    assert_near(y, expected)
    gradients = as_tuple(backward(rearrange(dy) if dy.ndim else dy))
    for dx, dx_expected in zip(gradients, as_tuple(expected_back(dy)), strict=True):
        if dx is not None:
            assert_near(dx, dx_expected)


@given(calls=st.fixed_dictionaries(EVERYTHING))
def test_inputs_may_be_one_row_seen_again_and_again(calls):
    for call in calls.values():
        views = [np.broadcast_to(x[:1], x.shape) for x in call.arrays()]
        (y, backward), (expected, expected_back) = call(*views), call(*map(np.array, views))
        assert_near(y, expected)
        dy = random_dy(call, expected)
        for dx, dx_expected in zip(
            as_tuple(backward(dy)), as_tuple(expected_back(dy)), strict=True
        ):
            if dx is not None:
                assert_near(dx, dx_expected)


@every_function
@given(data=st.data())
def test_dy_may_be_one_number_seen_as_an_array(name, data):
    call = data.draw(EVERYTHING[name])
    y, backward = call(*call.arrays())
    _, expected_back = call(*call.arrays())
    gradients = as_tuple(backward(np.broadcast_to(2.0, y.shape)))
    for dx, expected in zip(gradients, as_tuple(expected_back(np.full(y.shape, 2.0))), strict=True):
        if dx is not None:
            assert_near(dx, expected)


# ---------------------------------------------------------------------------------- dtypes and bits


@every_function
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@given(data=st.data())
def test_the_dtype_goes_through(name, dtype, data):
    call = data.draw(EVERYTHING[name])
    y, backward = call(*call.arrays(dtype))
    assert y.dtype == dtype
    if dtype != "complex128":
        for dx in as_tuple(backward(random_dy(call, y))):
            assert dx is None or dx.dtype == dtype


@every_function
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(data=st.data())
def test_the_same_call_gives_the_same_bits(name, dtype, data):
    call = data.draw(EVERYTHING[name])
    (y, backward), (y2, backward2) = (call(*call.arrays(dtype)) for _ in range(2))
    assert same_bits(y, y2)
    dy = random_dy(call, y)
    for dx, dx2 in zip(as_tuple(backward(dy)), as_tuple(backward2(dy)), strict=True):
        assert same_bits(dx, dx2)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(data=st.data(), seed=seeds)
def test_gradients_of_parts_of_a_batch_add_up(name, data, seed):
    call = data.draw(FUNCTIONS[name])
    rng = np.random.default_rng(seed)

    # Another sample joins: it is a batch of one, and what is no batch is shared.
    first, second, both = {}, {}, {}
    for key, x in [*zip(call.shapes, call.arrays(), strict=True), *call.options.items()]:
        first[key] = second[key] = both[key] = x
        if key in call.batched:
            second[key] = rng.permutation(x)[:1] if x.dtype.kind == "i" else x[:1] - 0.7
            both[key] = np.concatenate([first[key], second[key]])

    def run(arguments, dy):
        options = {key: arguments[key] for key in call.options}
        y, backward = replace(call, options=options)(*(arguments[key] for key in call.shapes))
        return y, as_tuple(backward(dy))

    y, _ = call(*call.arrays())
    dy = random_array(rng, (len(y) + 1, *y.shape[1:]))
    y_first, gradients_first = run(first, dy[:-1])
    y_second, gradients_second = run(second, dy[-1:])
    y, gradients = run(both, dy)
    assert_near(y, np.concatenate([y_first, y_second]))
    each = zip(call.shapes, gradients, gradients_first, gradients_second, strict=False)
    for key, whole, one, other in each:
        if key in call.batched:
            assert_near(whole, np.concatenate([one, other]))
        else:
            assert_near(whole, one + other)


# ------------------------------------------------------------------------------------------ no_grad


@every_function
@given(data=st.data())
def test_no_grad_gives_the_same_bits_and_keeps_nothing(name, data):
    call = data.draw(EVERYTHING[name])
    inputs = call.arrays()
    expected, _ = call(*inputs)
    kept = [weakref.ref(x) for x in inputs]
    with no_grad():
        y, backward = call(*inputs)
    assert backward is None
    assert same_bits(y, expected)
    del inputs, _
    assert not any(ref() is not None for ref in kept)


def is_recording(_=None):
    return silu(np.ones((1, 1)))[1] is not None


def test_no_grad_ends_with_its_block():
    assert is_recording()
    with no_grad():
        assert not is_recording()
        with no_grad():
            assert not is_recording()
        assert not is_recording()
    assert is_recording()
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert is_recording()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_threads_take_no_grad_from_their_caller(workers):
    assert all(map_threads(is_recording, range(7), workers))
    with no_grad():
        assert not any(map_threads(is_recording, range(7), workers))
    assert all(map_threads(is_recording, range(7), workers))


def test_no_grad_in_a_thread_stays_there():
    def alternate(i):
        if i % 2:
            return is_recording()
        with no_grad():
            return is_recording()

    assert map_threads(alternate, range(8), 2) == [False, True] * 4
    assert is_recording()


# ------------------------------------------------------------------------------ layers and networks


class Net(Layer):
    """A little of everything: convolution, norm, and one linear layer that is used twice."""

    def __init__(self, middle="middle", last="middle"):
        self.conv = Conv2d("conv", 3, 4)
        self.norm = GroupNorm("norm", 4, groups=2, eps=1e-5, silu=True)
        self.middle = Linear(middle, 4, 4)
        self.last = Linear(last, 4, 4)
        self.seen = []  # weak references to the activations

    def __call__(self, params, x):
        backs = []
        for layer in (self.conv, self.norm, self.middle, self.last):
            x, back = layer(params, x)
            backs.append(back)
            self.seen.append(weakref.ref(x))

        def backward(dy, grads):
            for back in reversed(backs):
                dy = back(dy, grads)
            return dy

        return x, backward

    def living(self):
        return sum(ref() is not None for ref in self.seen)


def prepared(seed=0, n=2):
    net = Net()
    rng = np.random.default_rng(seed)
    x, dy = random_array(rng, (n, 5, 4, 3)), random_array(rng, (n, 5, 4, 4))
    return net, random_params(net, seed), x, dy


NAMES = sorted(Net().shapes())


@given(seeds)
def test_a_layer_used_twice_gets_both_gradients(seed):
    net, params, x, dy = prepared(seed)
    check(net, [x], params, tol=1e-12)

    shared, apart = {}, {}
    net(params, x)[1](dy, shared)
    copies = {name.replace("middle", "last"): params[name] for name in NAMES}
    Net("middle", "last")(params | copies, x)[1](dy, apart)
    for name in NAMES:
        other = name.replace("middle", "last")
        expected = apart[name] if other == name else apart[name] + apart[other]
        assert_near(shared[name], expected)


def test_gradients_are_added_to_those_already_there():
    net, params, x, dy = prepared()
    once, twice = {}, {}
    net(params, x)[1](dy, once)
    for _ in range(2):
        net(params, x)[1](dy, twice)
    assert once.keys() == twice.keys() == params.keys()
    for name in NAMES:
        assert_near(twice[name], 2 * once[name])


@given(seeds, st.sets(st.sampled_from(NAMES)))
def test_only_the_gradients_asked_for(seed, only):
    net, params, x, dy = prepared(seed)
    everything, some = {}, Grads(only=only)
    dx_expected = net(params, x)[1](dy, everything)
    dx = net(params, x)[1](dy, some)
    assert some.keys() == only
    assert all(same_bits(some[name], everything[name]) for name in only)
    assert same_bits(dx, dx_expected)
    assert same_bits(net(params, x)[1](dy, None), dx_expected)


def test_wants_and_add_grad():
    assert not wants_grad(None, "a")
    assert wants_grad({}, "a") and wants_grad({}, "a", None)
    some = Grads(only=["a"])
    assert wants_grad(some, "a") and wants_grad(some, "b", "a") and not wants_grad(some, "b", None)
    for grads, expected in [(None, None), ({}, {"a": 3, "b": 4}), (some, {"a": 3})]:
        for name, dw in [("a", 1), ("b", 4), ("a", 2)]:
            add_grad(grads, name, np.array([dw]))
        assert grads == expected


def test_a_network_frees_as_it_goes():
    net, params, x, dy = prepared()
    y, backward = net(params, x)
    del y
    assert net.living() == 3  # what each of the later three layers read
    backward(dy, {})
    assert net.living() == 0
    with pytest.raises(RuntimeError, match="linear was called a second time"):
        backward(dy, {})


def test_a_network_may_read_only():
    net, params, x, dy = prepared()
    expected, expected_grads = net(params, x)[0], {}
    dx_expected = net(params, x)[1](dy, expected_grads)
    for array in (*params.values(), x, dy):
        array.flags.writeable = False
    grads = {}
    y, backward = net(params, x)
    assert same_bits(y, expected)
    assert same_bits(backward(dy, grads), dx_expected)
    assert all(same_bits(grads[name], expected_grads[name]) for name in NAMES)


def test_a_network_keeps_nothing_under_no_grad():
    net, params, x, _ = prepared()
    expected, _ = net(params, x)
    net.seen.clear()
    with no_grad():
        y, backward = net(params, x)
    assert same_bits(y, expected)
    del y
    assert net.living() == 0
    del backward


@given(seeds, st.integers(1, 3))
def test_gradients_of_parts_of_a_batch_add_up_in_a_network(seed, at):
    net, params, x, dy = prepared(seed, n=4)
    whole, parts = {}, {}
    dx = net(params, x)[1](dy, whole)
    halves = [net(params, x[part])[1](dy[part], parts) for part in (slice(0, at), slice(at, None))]
    assert_near(np.concatenate(halves), dx)
    for name in NAMES:
        assert_near(parts[name], whole[name])


# ---------------------------------------------------------------------------------------- recompute


@given(seeds)
def test_recompute_has_the_same_bits(seed):
    net, params, x, dy = prepared(seed)
    expected, expected_back = net(params, x)
    y, backward = recompute(net, params, x)
    assert same_bits(y, expected)
    grads, expected_grads = {}, {}
    assert same_bits(backward(dy, grads), expected_back(dy, expected_grads))
    assert grads.keys() == expected_grads.keys()
    assert all(same_bits(grads[name], expected_grads[name]) for name in NAMES)


def test_recompute_passes_the_gradient_check():
    net, params, x, _ = prepared()
    check(lambda params, x: recompute(net, params, x), [x], params, tol=1e-12)


def test_recompute_holds_no_activations():
    net, params, x, dy = prepared()
    y, backward = recompute(net, params, x)
    del y
    assert net.living() == 0
    backward(dy, {})
    assert len(net.seen) == 2 * 4  # made once more
    assert net.living() == 0
    with pytest.raises(RuntimeError, match="recompute was called a second time"):
        backward(dy, {})


def test_recompute_under_no_grad():
    net, params, x, dy = prepared()
    with no_grad():
        y, backward = recompute(net, params, x)
    assert backward is None
    assert same_bits(y, net(params, x)[0])
    # A backward pass is allowed anywhere, and what it makes again is recorded.
    _, backward = recompute(net, params, x)
    with no_grad():
        dx = backward(dy, {})
        assert not is_recording()
    assert same_bits(dx, net(params, x)[1](dy, {}))


def test_recompute_in_threads_and_in_itself():
    net, params, x, dy = prepared()
    expected = net(params, x)[1](dy, {})

    def run(_):
        return recompute(lambda *args: recompute(net, *args), params, x)[1](dy, {})

    assert all(same_bits(dx, expected) for dx in map_threads(run, range(4), 2))


def test_recompute_passes_on_what_is_wanted():
    net, params, x, dy = prepared()
    some = Grads(only=["norm.weight"])
    recompute(net, params, x)[1](dy, some)
    assert some.keys() == {"norm.weight"}
