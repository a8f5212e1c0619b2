"""The classifier whose features judge pictures: gradients, sizes, training, and its file."""

import numpy as np
import pytest
from gradients import check, joined
from hypothesis import given
from hypothesis import strategies as st
from model_cases import numbers, random_params

from tinyldm.config import ConfigError
from tinyldm.models.classifier import Classifier
from tinyldm.nn import no_grad

CLASSES = {"colour": ["blue", "red"], "shape": ["circle", "square", "triangle"]}


# -------------------------------------------------------------------------------------- the network


@st.composite
def classifiers(draw):
    levels, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    widths = [2 * groups * draw(st.integers(1, 2)) for _ in range(levels)]
    config = {"widths": widths, "norm_num_groups": groups, "stride": draw(st.integers(1, 2))}
    return Classifier(config | {"classes": CLASSES})


@given(classifiers(), st.integers(8, 11), st.integers(8, 11), st.integers(0, 999).map(str))
def test_gradients(model, h, w, key):
    params, x = random_params(model.shapes(), key), numbers("x", 1, h, w, 3)
    body = {name: p for name, p in params.items() if name.startswith(("conv_in.", "blocks."))}
    check(joined(model), x, params)
    check(joined(model.features), x, body)
    pooled = body | {name: p for name, p in params.items() if name.startswith("norm_out.")}
    check(model.pooled, x, pooled)


def test_features_that_no_gradient_comes_from():
    """A perceptual loss may look at some levels only."""
    model = Classifier({"widths": [4, 8, 8], "norm_num_groups": 2, "classes": CLASSES})
    params, x = random_params(model.shapes()), numbers("x", 2, 9, 8, 3)

    def middle(moved, x):
        maps, backward = model.features(params | moved, x)
        return maps[1], lambda dy, grads: backward([None, dy, None], grads)

    names = ("conv_in.", "blocks.0.", "blocks.1.resnet.")
    check(middle, x, {name: p for name, p in params.items() if name.startswith(names)})


@pytest.mark.parametrize("stride, sides", [(1, [19, 9, 4, 2]), (2, [9, 4, 2, 1])])
def test_shapes_of_the_features(stride, sides):
    model = Classifier({"classes": CLASSES, "stride": stride})
    params, x = model.init(np.random.default_rng(0)), np.zeros((2, 19, 19, 3), "float32")
    with no_grad():
        maps, _ = model.features(params, x)
        pooled, _ = model.pooled(params, x)
        logits, _ = model(params, x)
    shapes = [(2, side, side, width) for side, width in zip(sides, (16, 32, 64, 64), strict=True)]
    assert [y.shape for y in maps] == shapes
    assert pooled.shape == (2, 64)
    assert [y.shape for y in logits] == [(2, 2), (2, 3)]
    assert {y.dtype.name for y in (*maps, pooled, *logits)} == {"float32"}


def test_pictures_that_are_too_small():
    model = Classifier({"classes": CLASSES, "stride": 2})
    params = model.init(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"at least 16×16, found \(1, 16, 15, 3\)"):
        model(params, np.zeros((1, 16, 15, 3), "float32"))


@pytest.mark.parametrize("config", [{}, {"classes": {"colour": []}}])
def test_a_classifier_without_classes(config):
    with pytest.raises(ConfigError, match="^classifier config: expected words for each"):
        Classifier(config)
