"""Runs with each first stage: Gaussian, of a codebook, and none."""

import dataclasses
import json

import numpy as np
import pytest
from gradients import check_loss
from model_cases import numbers, random_params
from small_run import CONFIG, STAGE, STEPS, assert_goes_on_alike, silent, without_images

from tinyldm.config import ConfigError
from tinyldm.models import IdentityFirstStage, VQModel
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training import codebook, loop, overfit, presets, stages
from tinyldm.training import run as runs
from tinyldm.training.config import Config
from tinyldm.training.estimate import estimate_run
from tinyldm.training.losses import autoencoder_loss
from tinyldm.training.state import State, load_state

CONFIGS = {
    "vq": dataclasses.replace(CONFIG, first_stage="vq", codes=12),
    "none": dataclasses.replace(CONFIG, first_stage="none"),
}
CLASSES = {"vq": VQModel, "none": IdentityFirstStage}


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(codebook, "EVERY", 1)


@pytest.mark.slow
def test_a_run_leaves_a_model_that_generates(kind, tmp_path, often):
    said = []
    pipeline = runs.train(tmp_path / "run", CONFIGS[kind], say=said.append)
    loaded = Pipeline.load(tmp_path / "run")
    assert isinstance(loaded.vae, CLASSES[kind])
    factor = {"vq": 2, "none": 1}[kind]
    assert loaded.vae.factor == factor and loaded.size == (16, 16)
    prompt = "a large red circle on blue at the left"
    (one,), (other,) = pipeline(prompt), loaded(prompt)
    assert one.tobytes() == other.tobytes() and one.size == (16, 16)
    index = json.loads((tmp_path / "run" / "model_index.json").read_text())
    assert index["_class_name"] == "TinyLDMPipeline"
    library = {"vq": "diffusers", "none": "tinyldm.models"}[kind]
    assert index["vae"] == [library, CLASSES[kind].__name__]
    lines = (tmp_path / "run" / "training" / "metrics.jsonl").read_text().splitlines()
    stages = {json.loads(line)["stage"] for line in lines}
    if kind == "none":
        assert stages == {"denoiser"}
        assert (tmp_path / "run" / "samples" / "reconstructions.png").exists()
    else:
        reports = [json.loads(line) for line in lines if "perplexity" in line]
        assert reports and all(1 <= r["perplexity"] <= 12 and 0 < r["usage"] <= 1 for r in reports)
        assert any(", perplexity " in line for line in said)


def test_latents_have_unit_variance_for_the_diffusion(kind, tmp_path, monkeypatch):
    without_images(monkeypatch)
    pipeline = runs.train(tmp_path / "run", CONFIGS[kind], say=silent)
    images, _ = runs.load_data(CONFIGS[kind]).split(CONFIG.held_out, CONFIG.seed)
    assert abs(pipeline.encode(images.images).std() - 1) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, step", [("vq", 2), ("vq", STEPS), ("vq", STEPS + 2), ("none", 2), ("none", STEPS)]
)
def test_stopped_and_resumed_the_bytes_are_the_same(kind, step, tmp_path, monkeypatch, often):
    assert_goes_on_alike(CONFIGS[kind], step, tmp_path, monkeypatch)


def test_without_a_first_stage_none_is_tried():
    estimate = estimate_run(CONFIGS["none"], 10)
    assert estimate.step_seconds.keys() == {"denoiser"} and estimate.seconds > 0


def test_an_unknown_first_stage_is_named():
    with pytest.raises(ConfigError, match="first_stage: expected kl, vq or none, found 'vqq'"):
        Config(first_stage="vqq")


# ------------------------------------------------------------------------------------- the codebook


def test_gradients_of_the_loss():
    vae = VQModel(CONFIGS["vq"].vae_config() | {"norm_num_groups": 2})
    params = random_params(vae.shapes())

    images = numbers("images", 2, 4, 4, 3)
    # Of the straight-through estimator: no derivative, but what it is made to say.
    check_loss(autoencoder_loss(vae, 1.0), params, {}, (images,), method="complex")


def test_dead_codes_begin_again_at_latents():
    vae = VQModel({"latent_channels": 2, "num_vq_embeddings": 6, "norm_num_groups": 1,
                   "block_out_channels": [4]})  # fmt: skip
    params = {n: x.astype(np.float32) for n, x in random_params(vae.shapes()).items()}
    pixels = numbers("pixels", 3, 4, 4, 3).astype(np.float32)
    z = vae.encode(params, pixels)[0].reshape(-1, 2)
    table = np.full((6, 2), 99, np.float32)
    table[2] = z.mean(axis=0)  # the only one that is near
    params[vae.quantize.weight] = table
    state = State(CONFIG, "autoencoder", params, None, "")
    state.moments["m"][vae.quantize.weight][...] = 1
    state.moments["v"][vae.quantize.weight][...] = 1
    revived = codebook.reinitialise_dead_codes(vae, state, pixels, np.random.default_rng(0))
    assert revived == 5
    found = state.params[vae.quantize.weight]
    np.testing.assert_array_equal(found[2], table[2])
    for row in (0, 1, 3, 4, 5):
        assert (abs(z - found[row]).max(axis=1) < 1e-6).any()
    np.testing.assert_array_equal(state.average[vae.quantize.weight], found)
    for moment in state.moments.values():
        assert moment[vae.quantize.weight][:, 0].tolist() == [0, 0, 1, 0, 0, 0]
    assert codebook.reinitialise_dead_codes(vae, state, pixels, np.random.default_rng(1)) < 5


def test_codes_are_revived_in_the_first_half(monkeypatch):
    monkeypatch.setattr(codebook, "EVERY", 10)
    steps = [
        step
        for step in range(1, 101)
        if codebook.due(State(CONFIG, "", {"a": np.zeros(1)}, None, "", step=step, total=100))
    ]
    assert steps == [10, 20, 30, 40, 50]


def test_states_of_before_are_read(tmp_path, monkeypatch):
    """Of runs that knew no first stage but the Gaussian one."""
    without_images(monkeypatch)
    runs.train(tmp_path / "run", CONFIG, say=silent)
    state = load_state(tmp_path / "run")
    content = dataclasses.asdict(state.config)
    del content["first_stage"], content["codes"]
    assert Config.from_json(content) == state.config
    assert state.config.autoencoder == STAGE


@pytest.mark.slow
def test_flipped_and_in_parts(call, tmp_path, monkeypatch):
    """From the command line: as many images again, and the same loss by other rounding.

    With checkpointing the loss is the same, bit for bit.
    """
    without_images(monkeypatch)
    monkeypatch.setitem(presets.PRESETS, "tiny", CONFIG)
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    losses = {}
    for options in ((), ("--accumulate", "3"), ("--flip",), ("--checkpointing",)):
        run = tmp_path / "-".join(["run", *options])
        assert call("train", "--preset", "tiny", "--out", run, *options).code == 0
        config = load_state(run).config
        assert config.flip == ("--flip" in options)
        assert config.checkpointing == ("--checkpointing" in options)
        assert config.denoiser.parts == config.autoencoder.parts == (3 if len(options) == 2 else 1)
        lines = (run / "training" / "metrics.jsonl").read_text().splitlines()
        losses[options] = [json.loads(line)["loss"] for line in lines]
    plain, in_parts, flipped, forgetful = losses.values()
    assert forgetful == plain
    np.testing.assert_allclose(in_parts, plain, rtol=1e-3)
    assert abs(np.subtract(flipped, plain)).max() > 1e-3
    result = call("train", "--out", run, "--resume", "--accumulate", "2")
    assert result.code == 2 and "--accumulate: a resumed run keeps it" in result.err


# ------------------------------------------------------------------------------------ the self-test


@pytest.mark.slow
@pytest.mark.parametrize("first_stage", ["kl", "vq", "none"])
def test_a_single_batch_is_learnt_by_heart(call, monkeypatch, first_stage, tmp_path):
    monkeypatch.chdir(tmp_path)
    if first_stage != "kl":  # once in full
        monkeypatch.setattr(overfit, "STEPS", 60)
        monkeypatch.setattr(overfit, "ENOUGH", 0.8)
    result = call("train", "--preset", "tiny", "--overfit", "--first-stage", first_stage)
    assert (result.code, result.out) == (0, ""), result.err
    assert "denoiser: loss " in result.err and "on one batch: it learns" in result.err
    assert ("autoencoder: loss " in result.err) == (first_stage != "none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_does_not_learn_is_told(call, monkeypatch):
    """Here every gradient has the wrong sign."""
    real = stages.denoiser_loss

    def wrong(*args):
        loss_fn = real(*args)

        def loss_of(*args):
            loss, backward = loss_fn(*args)

            def turned(grads):
                backward(grads)
                for name in grads:
                    grads[name] *= -1

            return loss, turned

        return loss_of

    monkeypatch.setattr(stages, "denoiser_loss", wrong)
    monkeypatch.setattr(overfit, "STEPS", 30)
    monkeypatch.setattr(overfit, "ENOUGH", 0.9)
    result = call("train", "--preset", "tiny", "--overfit", "--first-stage", "none")
    assert (result.code, result.out) == (1, "")
    assert "denoiser: loss" in result.err and "IT DOES NOT LEARN" in result.err
    assert "the self-test has failed" in result.err
