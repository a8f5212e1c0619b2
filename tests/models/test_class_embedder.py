"""Classes in place of texts: their names, their token, the networks that take them, whole runs."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from gradients import check, check_loss
from model_cases import numbers, random_params
from small_run import CONFIG, STEPS, assert_goes_on_alike, silent

from tinyldm.cli import evaluate as commands
from tinyldm.config import ConfigError
from tinyldm.data.dataset import DataError, Dataset
from tinyldm.evaluation.metrics import evaluate
from tinyldm.evaluation.table import table
from tinyldm.models import ClassEmbedder, ClassNames, UNet
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training import run as runs
from tinyldm.training import stages
from tinyldm.training.networks import Models, denoiser_loss
from tinyldm.training.preparation import fit_tokenizer, load_data

CONFIGS = {
    kind: dataclasses.replace(CONFIG, condition=kind) for kind in ("class-token", "class-time")
}
NAMES = ["red circle", "blue square", "green triangle"]


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def test_names_become_numbers_and_nothing_is_the_last():
    classes = ClassNames(NAMES)
    assert len(classes) == 4
    assert classes(["blue square", "", "red circle"]).tolist() == [1, 3, 0]
    assert classes("green triangle").tolist() == [2]
    assert classes([]).shape == (0,)
    with pytest.raises(ValueError, match="did you mean 'red circle'"):
        classes("red circel")


@pytest.mark.parametrize("names", [[], [""], ["a", ""], ["a", "a"], ["a", 3]])
def test_names_must_be_names(names):
    with pytest.raises(ValueError, match="classes: expected"):
        ClassNames(names)


def test_names_on_disk(tmp_path):
    ClassNames(NAMES).save(tmp_path)
    assert ClassNames.load(tmp_path).names == NAMES
    for text in ('{"names": ["a", "a"]}', '{"names": null}', "{}", "[]", "{"):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(ValueError, match=r"classes\.json: "):
            ClassNames.load(tmp_path)


def test_the_token_of_a_class():
    embedder = ClassEmbedder({"num_classes": 4, "hidden_size": 6})
    params = random_params(embedder.shapes(), "token")
    labels = np.array([2, 0, 2])
    context, _ = embedder(params, labels)
    assert context.shape == (3, 1, 6)
    np.testing.assert_array_equal(context[:, 0], params["embedding.weight"][labels])
    check(lambda p: embedder(p, labels), (), params)
    with pytest.raises(ValueError, match=r"expected labels \(n,\)"):
        embedder(params, labels[:, None])
    with pytest.raises(ConfigError, match="num_clases"):
        ClassEmbedder({"num_clases": 4})


def test_gradients_of_the_loss_with_classes(kind):
    """Of U-Net and token, or of a U-Net that has an embedding of classes itself."""
    models = Models(CONFIGS[kind], ClassNames(NAMES))
    shapes = models.unet.shapes() | (models.text.shapes() if models.text else {})
    params = random_params(shapes, kind)
    name = {"class-token": "embedding.weight", "class-time": "class_embedding.weight"}[kind]
    assert params[name].shape[0] == 4
    z, noise = numbers("z", 2, 4, 4, 4), numbers("noise", 2, 4, 4, 4)
    labels, t = np.array([0, 3]), np.array([10, 800])
    check_loss(denoiser_loss(models), params, {}, (z, noise, labels, t))


def test_the_u_net_of_classes_attends_to_itself():
    unet = UNet(CONFIGS["class-time"].unet_config(4))
    shapes = unet.shapes()
    assert not any("add_embedding" in name for name in shapes)
    assert shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (8, 8)
    params = unet.init(np.random.default_rng(0))
    x, t, labels = np.zeros((2, 4, 4, 4), np.float32), np.array([1, 2]), np.array([0, 3])
    y, _ = unet(params, x, t, None, labels)
    assert y.shape == x.shape
    with pytest.raises(ValueError, match="context was given, but each level attends to itself"):
        unet(params, x, t, np.zeros((2, 1, 8), np.float32), labels)
    with pytest.raises(ValueError, match="needs labels"):
        unet(params, x, t)
    config = CONFIGS["class-time"].unet_config(4)
    with pytest.raises(ConfigError, match="cross_attention_dim = .* is not implemented"):
        UNet(config | {"cross_attention_dim": [9]})
    with pytest.raises(ConfigError, match="addition_embed_type needs one"):
        UNet(config | {"addition_embed_type": "text"})
    token = UNet(CONFIGS["class-token"].unet_config(4))
    assert any("attn2" in name for name in token.shapes())
    assert not any("class_embedding" in name or "add_emb" in name for name in token.shapes())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """kind → folder, pipeline, lines that were said"""

    @functools.cache
    def of(kind):
        run, said = tmp_path_factory.mktemp("classes") / kind, []
        return run, runs.train(run, CONFIGS[kind], say=said.append), said

    return of


@pytest.mark.slow
def test_a_run_leaves_a_model_that_generates_classes(kind, trained):
    run, pipeline, said = trained(kind)
    assert any("3 classes: circle, square, triangle" in line for line in said)
    loaded = Pipeline.load(run)
    prompts = ["circle", "square"]
    for one, other in zip(pipeline(prompts), loaded(prompts), strict=True):
        assert one.tobytes() == other.tobytes() and one.size == (16, 16)
    index = json.loads((run / "model_index.json").read_text())
    assert index["_class_name"] == "TinyLDMPipeline"
    assert index["tokenizer"] == ["tinyldm.models", "ClassNames"]
    embedder = ["tinyldm.models", "ClassEmbedder"] if kind == "class-token" else [None, None]
    assert index["text_encoder"] == embedder
    assert (run / "text_encoder").exists() == (kind == "class-token")
    assert not (run / "samples" / "words.png").exists()
    entries = (run / "training" / "metrics.jsonl").read_text().splitlines()
    right = [e["right"] for e in map(json.loads, entries) if "right" in e]
    assert right and all(set(r) == {"shape", "all"} for r in right)
    with pytest.raises(
        ValueError, match=r"class of the model \(circle, square, triangle\).*did you mean 'circle'"
    ):
        pipeline("circles")


@pytest.mark.slow
def test_the_class_decides_what_is_generated(kind, trained):
    """Both ways, and with guidance also by what "no class" would be."""
    run, _, _ = trained(kind)
    pipeline = Pipeline.load(run)
    rng = np.random.default_rng(0)
    pipeline.params["unet"] = {  # a U-Net that does not begin with zeros
        name: w + rng.normal(0, 0.1, w.shape).astype(np.float32)
        for name, w in pipeline.params["unet"].items()
    }
    noise = np.random.default_rng(1).standard_normal((1, 8, 8, 4), dtype=np.float32)

    def ends(prompt, **options):
        recipe = pipeline.sampling_params(prompt, **options)
        *_, (x, _) = pipeline.denoise(recipe, noise)
        return x

    circle, square, none = (ends(name, guidance=1) for name in ("circle", "square", ""))
    assert abs(circle - square).max() > 1e-3 and abs(circle - none).max() > 1e-3
    # One step of guidance leads from what no class gives, through what the class gives.
    one_step = {"steps": 1, "sampler": "ddim"}
    circle, none = (ends(name, guidance=1, **one_step) for name in ("circle", ""))
    np.testing.assert_allclose(
        ends("circle", guidance=3, **one_step), none + 3 * (circle - none), rtol=0, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, STEPS + 2])
def test_stopped_and_resumed_the_bytes_are_the_same(kind, step, tmp_path, monkeypatch):
    assert_goes_on_alike(CONFIGS[kind], step, tmp_path, monkeypatch)


def test_classes_left_out_are_the_class_of_nothing():
    config = dataclasses.replace(CONFIGS["class-time"], caption_dropout=0.5)
    data = load_data(config)
    tokenizer, config = fit_tokenizer(config, data.captions, silent)
    models = Models(config, tokenizer)
    params = models.vae.init(np.random.default_rng(0))
    state = stages.second_stage(models, params, data, "", "cpu", silent)
    batch_at = stages.Run("", state, models, data, data, "cpu", silent).job().batch_at
    labels = np.concatenate([batch_at(step)[2] for step in range(60)])
    assert 0.35 < (labels == len(tokenizer) - 1).mean() < 0.65
    assert set(labels) <= set(range(len(tokenizer)))


@pytest.mark.slow
def test_scoring_reads_the_shape_back(kind, trained):
    _, pipeline, _ = trained(kind)
    config = CONFIGS[kind]
    training, held_out = commands.split(load_data(config), config)
    result, _ = evaluate(pipeline, training, held_out, 6, shapes=commands.prompts_of(config))
    assert set(result["seen"]) == {"shape", "all"} and "held_out" not in result
    assert result["captions"] == 6 and set(result["reader"]) > {"position"}
    assert "held out" not in table(result) and "combinations seen" in table(result)


def test_images_whose_captions_are_no_classes():
    images = np.zeros((3, 16, 16, 3), np.uint8)
    config = CONFIGS["class-token"]
    for captions, found in ((["a", "a", "a"], "1 different"), (["a", "", "b"], "without one")):
        data = Dataset(images, captions, captions)
        with pytest.raises(DataError, match=found):
            fit_tokenizer(config, data.captions, silent)


def test_without_a_condition_captions_do_not_matter():
    config = dataclasses.replace(CONFIG, condition="none")
    assert set(load_data(config).captions) == {""}


@pytest.mark.slow
def test_u_net_and_condition_must_fit(trained):
    _, pipeline, _ = trained("class-token")
    other = trained("class-time")[1]
    mixed = pipeline.configs | {"unet": other.configs["unet"]}
    with pytest.raises(ConfigError, match="num_class_embeds"):
        Pipeline(mixed, pipeline.params, pipeline.tokenizer)
    with pytest.raises(ConfigError, match="condition: expected text, class-token"):
        dataclasses.replace(CONFIG, condition="class")
