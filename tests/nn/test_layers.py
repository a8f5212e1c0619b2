"""The layers: names, shapes and first values, and the functions under them with right gradients."""

import tracemalloc
import weakref

import numpy as np
import pytest
from gradients import check
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_near
from strategies import batches, random_array, random_params, seeds, sizes

from tinyldm.nn import Grads, layers, no_grad
from tinyldm.nn import functional as F
from tinyldm.nn.activations import silu
from tinyldm.nn.conv import conv2d
from tinyldm.nn.layers import Conv2d, Embedding, GroupNorm, Layer, LayerNorm, Linear, Offset
from tinyldm.nn.norms import group_norm, group_norm_silu, layer_norm

# Each strategy draws a layer called "a.b" and the shape of an input that fits.


@st.composite
def linears(draw):
    d_in, d_out = draw(sizes), draw(sizes)
    return Linear("a.b", d_in, d_out, bias=draw(st.booleans())), (draw(batches), 3, d_in)


@st.composite
def convolutions(draw):
    kernel, stride, c_in = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(sizes)
    padding = draw(st.sampled_from([None, 2, (0, 1, 0, 1)]))
    layer = Conv2d("a.b", c_in, draw(sizes), kernel, stride, padding)
    return layer, (draw(batches), kernel + draw(sizes), kernel + draw(sizes), c_in)


@st.composite
def group_norms(draw):
    groups = draw(st.integers(1, 3))
    c = groups * draw(st.integers(1, 3))
    layer = GroupNorm("a.b", c, groups, eps=1e-5, silu=draw(st.booleans()))
    return layer, (draw(batches), 3, draw(sizes), c)


@st.composite
def layer_norms(draw):
    d = draw(st.integers(3, 6))
    return LayerNorm("a.b", d), (draw(batches), draw(sizes), d)


@st.composite
def embeddings(draw):
    return Embedding("a.b", 5, draw(sizes)), (draw(batches), draw(sizes))


@st.composite
def offsets(draw):
    length, d = draw(sizes), draw(sizes)
    return Offset("a.b", length, d, std=0.01), (draw(batches), draw(st.integers(1, length)), d)


LAYERS = {
    "Linear": linears(),
    "Conv2d": convolutions(),
    "GroupNorm": group_norms(),
    "LayerNorm": layer_norms(),
    "Embedding": embeddings(),
    "Offset": offsets(),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def arguments(layer, shape, seed):
    """Random parameters, and an input: integers for an embedding."""
    rng = np.random.default_rng(seed)
    if isinstance(layer, Embedding):
        return random_params(layer, seed), rng.integers(0, 5, shape)
    return random_params(layer, seed), random_array(rng, shape)


# -------------------------------------------------------------------------------------- every layer


@every_layer
@given(data=st.data(), seed=seeds)
def test_gradients(name, data, seed):
    layer, shape = data.draw(LAYERS[name])
    params, x = arguments(layer, shape, seed)
    check(layer, [x], params, tol=1e-12)


@every_layer
@given(data=st.data(), seed=seeds)
def test_first_values_follow_from_the_seed(name, data, seed):
    layer, _ = data.draw(LAYERS[name])
    params, again = (layer.init(np.random.default_rng(seed)) for _ in range(2))
    assert {name: w.shape for name, w in params.items()} == layer.shapes()
    assert all(w.dtype == "float32" and np.isfinite(w).all() for w in params.values())
    assert all(np.array_equal(params[name], again[name]) for name in params)


@every_layer
@given(data=st.data(), seed=seeds)
def test_only_the_gradients_asked_for(name, data, seed):
    layer, shape = data.draw(LAYERS[name])
    params, x = arguments(layer, shape, seed)
    y, backward = layer(params, x)
    everything = {}
    dx = backward(y, everything)
    assert everything.keys() == params.keys()
    only = data.draw(st.sets(st.sampled_from(sorted(params))))
    for grads in (Grads(only), None):
        dx_again = layer(params, x)[1](y, grads)
        assert dx is dx_again is None or np.array_equal(dx, dx_again)
        if grads is not None:
            assert grads.keys() == only
            assert all(np.array_equal(grads[name], everything[name]) for name in only)


@every_layer
@given(data=st.data(), seed=seeds)
def test_a_backward_pass_runs_once(name, data, seed):
    layer, shape = data.draw(LAYERS[name])
    y, backward = layer(*arguments(layer, shape, seed))
    backward(y, {})
    with pytest.raises(RuntimeError, match="called a second time"):
        backward(y, {})


@every_layer
@given(data=st.data(), seed=seeds)
def test_no_grad_keeps_neither_input_nor_result(name, data, seed):
    layer, shape = data.draw(LAYERS[name])
    params, x = arguments(layer, shape, seed)
    expected, _ = layer(params, x)
    with no_grad():
        y, backward = layer(params, x)
    assert np.array_equal(y, expected)
    kept = [weakref.ref(x), weakref.ref(y)]
    del x, y, _
    assert not any(ref() is not None for ref in kept)
    del backward


# A layer with weights that are much larger than its input and its result.
HEAVY = {
    "Linear": (Linear("a", 300, 300), (1, 300)),
    "Conv2d": (Conv2d("a", 100, 100), (1, 3, 3, 100)),
    "pointwise": (Conv2d("a", 300, 300, kernel=1), (1, 1, 1, 300)),
    "Embedding": (Embedding("a", 30_000, 3), (1, 2)),
    "Offset": (Offset("a", 30_000, 3, std=1), (1, 2, 3)),
}


@pytest.mark.parametrize("name", HEAVY)
def test_the_work_for_unwanted_gradients_is_not_done(name):
    layer, shape = HEAVY[name]
    params, x = arguments(layer, shape, seed=0)

    def peak(grads):
        y, backward = layer(params, x)
        tracemalloc.start()
        backward(y, grads)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    weights = params[next(name for name in params if "bias" not in name)].nbytes
    assert peak({}) - peak(None) > 0.9 * weights
    assert peak({}) - peak(Grads(only=["another"])) > 0.9 * weights


@pytest.mark.parametrize("name", ["linear", "conv2d", "group_norm", "layer_norm"])
def test_the_functions_are_told_which_gradients_are_wanted(name, monkeypatch):
    module = F if name == "linear" else layers
    function = getattr(module, name)
    told = []

    def listening(*args):
        y, backward = function(*args)

        def listening_back(dy, **options):
            told.append(options)
            return backward(dy, **options)

        return y, listening_back

    monkeypatch.setattr(module, name, listening)
    layer, shape = {
        "linear": (Linear("a", 3, 4), (2, 3)),
        "conv2d": (Conv2d("a", 3, 4), (2, 3, 3, 3)),
        "group_norm": (GroupNorm("a", 4, 2, 1e-5), (2, 3, 4)),
        "layer_norm": (LayerNorm("a", 4), (2, 4)),
    }[name]
    params, x = arguments(layer, shape, seed=0)
    for grads in ({}, None, Grads(only=[]), Grads(only=["a.weight"]), Grads(only=["a.bias"])):
        y, backward = layer(params, x)
        backward(y, grads)
    assert [options["weights"] for options in told] == [True, False, False, True, True]


# ----------------------------------------------------------------------------------- layer by layer


@given(linears(), seeds)
def test_linear(drawn, seed):
    layer, shape = drawn
    assert layer.shapes()["a.b.weight"] == (layer.d_out, layer.d_in)
    params, x = arguments(layer, shape, seed)
    y, _ = layer(params, x)
    assert np.array_equal(y, F.linear(x, params["a.b.weight"], params.get("a.b.bias"))[0])


@given(convolutions(), seeds)
def test_conv2d(drawn, seed):
    layer, shape = drawn
    kernel, _, c_in, c_out = layer.shapes()["a.b.weight"]
    assert layer.shapes() == {"a.b.weight": (kernel, kernel, c_in, c_out), "a.b.bias": (c_out,)}
    params, x = arguments(layer, shape, seed)
    w, b = params["a.b.weight"], params["a.b.bias"]
    y, _ = layer(params, x)
    assert np.array_equal(y, conv2d(x, w, b, layer.options[0], layer.options[1])[0])


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_conv2d_keeps_the_size_by_default(kernel):
    layer = Conv2d("a", 2, 3, kernel)
    y, _ = layer(random_params(layer), np.ones((1, 6, 7, 2)))
    assert y.shape == (1, 6, 7, 3)


@given(group_norms(), seeds)
def test_group_norm(drawn, seed):
    layer, shape = drawn
    params, x = arguments(layer, shape, seed)
    y, _ = layer(params, x)
    w, b = params["a.b.weight"], params["a.b.bias"]
    h, _ = group_norm(x, w, b, *layer.options)
    assert_near(y, silu(h)[0] if layer.function is group_norm_silu else h)


def test_group_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match=r"a\.b: 6 channels do not divide into 4 groups"):
        GroupNorm("a.b", 6, groups=4, eps=1e-5)


@given(layer_norms(), seeds)
def test_layer_norm(drawn, seed):
    layer, shape = drawn
    params, x = arguments(layer, shape, seed)
    y, _ = layer(params, x)
    assert np.array_equal(y, layer_norm(x, params["a.b.weight"], params["a.b.bias"], 1e-5)[0])


@given(embeddings(), seeds)
def test_embedding(drawn, seed):
    layer, shape = drawn
    params, ids = arguments(layer, shape, seed)
    y, backward = layer(params, ids)
    assert np.array_equal(y, params["a.b.weight"][ids])
    assert backward(y, {}) is None  # integers have no gradient


@given(offsets(), seeds)
def test_offset(drawn, seed):
    layer, shape = drawn
    params, x = arguments(layer, shape, seed)
    y, _ = layer(params, x)
    assert layer.shapes() == {"a.b": params["a.b"].shape}
    assert np.array_equal(y, x + params["a.b"][: x.shape[1]])


def test_offset_refuses_too_many_tokens():
    layer = Offset("positions", 77, 4, std=0.01)
    with pytest.raises(ValueError, match="offset: expected at most 77 tokens, found 78"):
        layer(random_params(layer), np.zeros((1, 78, 4)))


# ----------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("layer", [Linear("a", 400, 8000), Conv2d("a", 16, 8000, 5)])
def test_weights_and_biases_start_uniform_within_one_over_the_root_of_their_inputs(layer):
    params = layer.init(np.random.default_rng(0))
    for w in (params["a.weight"], params["a.bias"]):
        assert 0.999 / 20 < np.abs(w).max() <= np.float32(1 / 20)
        assert w.std() == pytest.approx(1 / 20 / np.sqrt(3), rel=0.02)
        assert abs(w.mean()) < 0.02 / 20


def test_norms_start_as_norms_alone():
    for layer in (GroupNorm("a", 6, 2, 1e-5), LayerNorm("a", 6)):
        params = layer.init(np.random.default_rng(0))
        assert (params["a.weight"] == 1).all() and not params["a.bias"].any()


def test_tables_start_normal():
    rng = np.random.default_rng(0)
    for layer, name, std in [
        (Embedding("a", 500, 200), "a.weight", 1),
        (Embedding("a", 500, 200, std=0.5), "a.weight", 0.5),
        (Offset("a", 500, 200, std=0.01), "a", 0.01),
    ]:
        w = layer.init(rng)[name]
        assert w.std() == pytest.approx(std, rel=0.01)
        assert abs(w.mean()) < 0.01 * std


def test_another_initialiser():
    for kind in (Linear, Conv2d):
        layer = kind("a", 3, 4, init=layers.zeros)
        assert not any(w.any() for w in layer.init(np.random.default_rng(0)).values())
    ones = Linear("a", 3, 4, init=layers.ones).init(np.random.default_rng(0))["a.weight"]
    assert (ones == 1).all()


# -------------------------------------------------------------------------------------------- trees


class Tree(Layer):
    def __init__(self):
        self.size = 3
        self.first = Linear("first", 2, 3)
        self.nothing = None
        self.many = [LayerNorm("many.0", 3), None, Linear("many.2", 3, 2, bias=False)]


def test_the_parameters_of_a_tree_are_those_of_its_leaves_in_order():
    shapes = Tree().shapes()
    assert list(shapes.items()) == [
        ("first.weight", (3, 2)),
        ("first.bias", (3,)),
        ("many.0.weight", (3,)),
        ("many.0.bias", (3,)),
        ("many.2.weight", (2, 3)),
    ]
    params = Tree().init(np.random.default_rng(5))
    assert {name: w.shape for name, w in params.items()} == shapes
    # A leaf draws what it would draw alone.
    alone = Linear("first", 2, 3).init(np.random.default_rng(5))
    assert np.array_equal(params["first.weight"], alone["first.weight"])
