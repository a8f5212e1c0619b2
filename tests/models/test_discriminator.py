"""The patch discriminator: its shapes, what a logit sees, its gradients."""

import numpy as np
import pytest
from gradients import check
from hypothesis import given
from hypothesis import strategies as st
from model_cases import keys, numbers, random_params

from tinyldm.models.discriminator import PatchDiscriminator


@given(
    layers=st.integers(1, 2),
    c_in=st.integers(1, 3),
    h=st.integers(16, 18),
    w=st.integers(16, 18),
    key=keys,
)
def test_gradients(layers, c_in, h, w, key):
    model = PatchDiscriminator("d", c_in, 2, groups=2, layers=layers)
    check(model, numbers("x", 1, h, w, c_in), random_params(model.shapes(), key))


@pytest.mark.parametrize("layers, sees", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers, sees):
    """But for the norms, which see everything."""
    model = PatchDiscriminator("d", 1, 2, groups=1, layers=layers)
    params = {name: np.ones(shape) for name, shape in model.shapes().items()}
    model.norms = [lambda params, x: (x, lambda dy, grads: dy)] * layers
    y, backward = model(params, np.ones((1, 96, 96, 1)))
    dy = np.zeros(y.shape)
    dy[0, y.shape[1] // 2, y.shape[2] // 2] = 1
    dx = backward(dy, None)[0, :, :, 0]
    seen = dx > 0
    assert np.flatnonzero(seen.any(axis=0)).size == np.flatnonzero(seen.any(axis=1)).size == sees


def test_names_shapes_and_sizes():
    model = PatchDiscriminator("d", 3, 8, groups=4, layers=2)
    shapes = model.shapes()
    assert shapes["d.convs.0.weight"] == (4, 4, 3, 8)
    assert shapes["d.convs.2.weight"] == (4, 4, 16, 32)
    assert shapes["d.convs.3.weight"] == (4, 4, 32, 1)
    assert shapes["d.norms.2.weight"] == (32,) and "d.norms.3.weight" not in shapes
    params = model.init(np.random.default_rng(0))
    assert model(params, np.zeros((2, 32, 48, 3), "float32"))[0].shape == (2, 6, 10, 1)
    assert model(params, np.zeros((2, 16, 16, 3), "float32"))[0].shape == (2, 2, 2, 1)
    with pytest.raises(ValueError, match="does not fit"):
        model(params, np.zeros((2, 8, 8, 3), "float32"))
    deep = PatchDiscriminator("d", 3, 4, groups=1, layers=5).shapes()
    assert [deep[f"d.convs.{i}.weight"][3] for i in range(7)] == [4, 8, 16, 32, 32, 32, 1]


def test_an_image_is_judged_alone():
    model = PatchDiscriminator("d", 2, 2, groups=2)
    params = random_params(model.shapes())
    x = numbers("x", 3, 16, 16, 2)
    whole, _ = model(params, x)
    each = np.concatenate([model(params, x[i : i + 1])[0] for i in range(3)])
    np.testing.assert_allclose(whole, each, rtol=1e-12)
