"""The classifier whose features judge images: gradients, sizes, training, and its file."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from gradients import check, check_loss, joined
from hypothesis import given
from hypothesis import strategies as st
from model_cases import numbers, random_params
from small_run import CONFIG, without_images

from tinyldm.checkpoints.safetensors import WeightsError, load_metadata, load_weights, save_weights
from tinyldm.config import ConfigError
from tinyldm.data.dataset import Dataset
from tinyldm.data.images import from_uint8
from tinyldm.data.shapes import ATTRIBUTES, COLOURS, Attributes, make_shapes
from tinyldm.evaluation.statistics import frechet_distance, kernel_distance, precision_recall
from tinyldm.models.classifier import Classifier
from tinyldm.nn import no_grad
from tinyldm.training import classifier
from tinyldm.training.classifier import (
    FILE,
    attributes_of,
    classifier_loss,
    classifier_of,
    fit_classifier,
    load_classifier,
    save_classifier,
)
from tinyldm.training.losses import perceptual_loss
from tinyldm.training.preparation import load_data, split
from tinyldm.training.run import train

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


def test_images_that_are_too_small():
    model = Classifier({"classes": CLASSES, "stride": 2})
    params = model.init(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"at least 16×16, found \(1, 16, 15, 3\)"):
        model(params, np.zeros((1, 16, 15, 3), "float32"))


@pytest.mark.parametrize("config", [{}, {"classes": {"colour": []}}])
def test_a_classifier_without_classes(config):
    with pytest.raises(ConfigError, match="^classifier config: expected words for each"):
        Classifier(config)


# ------------------------------------------------------------------------------------- its training


def dataset(captions, images=None):
    images = np.zeros((len(captions), 16, 16, 3), np.uint8) if images is None else images
    return Dataset(images, list(captions), [""] * len(captions))


def silent(line):
    pass


@pytest.fixture(scope="module")
def shapes():
    """Images whose captions are the colours of their grounds: for training, and held out."""
    images, captions = make_shapes(450, 16)
    data = dataset([Attributes.parse(caption).background for caption in captions], images)
    return SimpleNamespace(training=data.pick(range(300)), held_out=data.pick(range(300, 450)))


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "BATCH", 32)
        yield


@pytest.fixture(scope="module")
def trained_classifier(shapes):
    return fit_classifier(shapes.training, shapes.held_out, steps=60, data="abc", say=silent)


def test_gradients_of_the_loss():
    model = Classifier({"widths": [4, 8], "norm_num_groups": 2, "classes": CLASSES})
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    batch = images, np.array([[0, 2], [1, 0], [1, 1]])
    check_loss(classifier_loss(model), random_params(model.shapes()), {}, batch)


@pytest.mark.slow
def test_it_learns(trained_classifier):
    assert trained_classifier.notes.accuracy > 0.6
    assert trained_classifier.notes.config["classes"] == {"caption": sorted(COLOURS)}


@pytest.mark.slow
def test_equal_seeds_and_steps_give_equal_weights(shapes):
    def weights(seed):
        made = fit_classifier(shapes.training, shapes.held_out, steps=2, seed=seed, say=silent)
        return made.params

    one, same, other = weights(0), weights(0), weights(1)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not any(np.array_equal(one[name], other[name]) for name in one if "norm" not in name)


@pytest.mark.slow
def test_features_tell_true_images_from_others(trained_classifier, shapes):
    """Held-out images on red are near to the training's images on red; those on orange not."""

    def features(data, colour):
        return trained_classifier.features(
            data.images[[caption == colour for caption in data.captions]]
        )

    real, unseen = features(shapes.training, "red"), features(shapes.held_out, "red")
    wrong = features(shapes.held_out, "orange")
    assert unseen.dtype == "float64" and unseen.shape[1] == 64
    assert 4 * frechet_distance(unseen, real) < frechet_distance(wrong, real)
    assert 4 * kernel_distance(unseen, real) < kernel_distance(wrong, real)
    assert precision_recall(unseen, real)[0] > 2 * precision_recall(wrong, real)[0]


def test_what_there_is_to_learn():
    captions = make_shapes(3, 16)[1]
    said = attributes_of(captions)
    assert list(said) == list(ATTRIBUTES)
    assert said["colour"] == [Attributes.parse(caption).colour for caption in captions]
    assert attributes_of([*captions, "a cat"]) == {"caption": [*captions, "a cat"]}


@pytest.mark.parametrize(
    "training, held_out",
    [
        (["cat"] * 40, ["cat"] * 4),
        (["cat", "dog"] * 20, []),
        ([f"cat {i}" for i in range(40)], ["cat 0"]),
        (["cat", "dog"] * 3 + ["bird"], ["cat"]),
        (make_shapes(30, 16)[1], make_shapes(9, 16)[1]),
    ],
    ids=["all alike", "none held out", "all different", "few each", "few of each colour"],
)
def test_captions_that_say_too_little(training, held_out):
    said = []
    made = fit_classifier(dataset(training), dataset(held_out), steps=1, say=said.append)
    assert made is None
    assert len(said) == 1 and said[0].startswith("no classifier: ")


def test_a_caption_that_training_never_saw_is_never_right():
    captions = ["cat", "dog"] * 8
    made = fit_classifier(dataset(captions), dataset(["bird"] * 5), steps=1, say=silent)
    assert made.notes.accuracy == 0


# ----------------------------------------------------------------------------------------- its file


def test_round_trip(trained_classifier, shapes, tmp_path):
    save_classifier(tmp_path / FILE, trained_classifier)
    loaded = load_classifier(tmp_path / FILE)
    assert loaded.notes == trained_classifier.notes
    images = shapes.held_out.images[:5]
    np.testing.assert_array_equal(loaded.features(images), trained_classifier.features(images))
    assert [path.name for path in (tmp_path / "training").iterdir()] == ["classifier.safetensors"]


def test_a_classifier_is_used_again_where_it_fits(shapes, tmp_path, monkeypatch):
    trained = []
    fit = fit_classifier

    def counted(*args, **options):
        trained.append(None)
        return fit(*args, **options)

    def use(data, seconds):
        return classifier_of(tmp_path, shapes.training, shapes.held_out, data, seconds, say=silent)

    monkeypatch.setattr(classifier, "fit_classifier", counted)
    assert use("abc", 0) is None
    assert list(tmp_path.iterdir()) == [] and not trained
    for data, seconds, times in [
        ("abc", 0.02, 1), ("abc", 0.02, 1), ("abc", 0.01, 1), ("abc", 0.03, 2), ("else", 0.01, 3),
    ]:  # fmt: skip
        made = use(data, seconds)
        assert made.notes.data == data and len(trained) == times
        assert made.notes == load_classifier(tmp_path / FILE).notes


def test_training_ends_after_its_seconds(shapes):
    said = []
    made = fit_classifier(shapes.training, shapes.held_out, 1e-6, say=said.append)
    assert made.notes.seconds == 1e-6 and said[-1].endswith("held-out images (1 steps)")


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-3])


def rewrite(change):
    def spoil(file):
        params, notes = load_weights(file), json.loads(load_metadata(file)["tinyldm"])
        change(params, notes)
        save_weights(file, params, {"tinyldm": json.dumps(notes)})

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (cut_off, "or cut off"),
        (lambda file: file.write_bytes(b"{}"), "not a safetensors file"),
        (lambda file: save_weights(file, {}), "not a classifier, or of another version: 'tinyldm'"),
        (rewrite(lambda params, notes: notes.pop("data")), "another version: .*'data'"),
        (rewrite(lambda params, notes: notes["config"].update(depth=3)), "unknown key 'depth'"),
        (rewrite(lambda params, notes: notes["config"].update(widths=8)), "another version: "),
        (rewrite(lambda params, notes: notes["config"].update(widths=[])), "another version: "),
        (rewrite(lambda params, notes: params.pop("conv_in.bias")), "missing .1.: conv_in.bias"),
    ],
)
def test_a_damaged_file_gets_one_line(trained_classifier, tmp_path, spoil, message):
    save_classifier(tmp_path / "a", trained_classifier)
    spoil(tmp_path / "a")
    with pytest.raises(WeightsError, match=message) as caught:
        load_classifier(tmp_path / "a")
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'a'}: ") and "\n" not in line
    assert line.endswith("; remove it, and `tinyldm eval` trains another")


def test_oblong_and_tiny_images():
    """The shorter side decides how much the first convolution reduces; of 4 pixels none does."""
    rng = np.random.default_rng(0)
    for sides, fits in (((128, 32), True), ((16, 9), True), ((4, 32), False)):
        images = rng.integers(0, 256, (12, *sides, 3), np.uint8)
        data = Dataset(images, ["a", "b"] * 6, [""] * 12)
        said = []
        trained_classifier = fit_classifier(data, data.pick([0, 1]), steps=1, say=said.append)
        assert bool(trained_classifier) == fits and said
        if trained_classifier:
            assert trained_classifier.features(images[:3]).shape[0] == 3


def test_captions_and_classes_of_shapes_mixed():
    assert attributes_of(["circle", "a large red square on blue at the top"]) == {
        "shape": ["circle", "square"]
    }


def test_a_network_for_a_perceptual_loss():
    """Its maps, of images in −1…1, with the gradient of the images alone."""
    images, captions = make_shapes(24, 16, 0)
    data = Dataset(images, [Attributes.parse(caption).shape for caption in captions], captions)
    trained_classifier = fit_classifier(data, data.pick([0, 1]), steps=1, say=lambda line: None)
    distance = perceptual_loss(trained_classifier.maps)
    x, y = from_uint8(images[:2]), from_uint8(images[2:4])
    loss, backward = distance(x, y)
    dx = backward()
    assert loss > 0 and dx.shape == x.shape and np.isfinite(dx).all()
    assert float(distance(y, y)[0]) == 0
    closer, _ = distance(x - np.float32(0.01 / np.linalg.norm(dx)) * dx, y)
    assert closer < loss


@pytest.mark.slow
def test_a_run_with_a_perceptual_loss_on_it(tmp_path, monkeypatch):
    """As the README shows it: the first stage learns from the run's own classifier, too."""
    without_images(monkeypatch)
    config = dataclasses.replace(CONFIG, images=64, condition="class-token", perceptual=0.1)
    training, held_out = split(load_data(config), config)
    trained_classifier = fit_classifier(training, held_out, steps=1, say=lambda line: None)
    pipelines = [
        train(tmp_path / str(weight), dataclasses.replace(config, perceptual=weight), "cpu", False,
              lambda line: None, features)
        for weight, features in ((0.1, trained_classifier.maps), (0.0, None))
    ]  # fmt: skip
    one, other = (pipeline.params["vae"] for pipeline in pipelines)
    assert any((one[name] != other[name]).any() for name in one)
