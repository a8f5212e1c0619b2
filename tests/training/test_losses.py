"""The losses of the first stage: perceptual and adversarial, alone and in runs of a few steps."""

import dataclasses
import json
import math
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from gradients import check, check_loss
from model_cases import numbers, random_params
from reference import assert_near
from small_run import CONFIG, STAGE, STEPS, at_step, silent, without_images

from tinyldm.checkpoints.safetensors import load_weights
from tinyldm.config import ConfigError
from tinyldm.kernels.cpu import parallel
from tinyldm.models import AutoencoderKL, Tokenizer, VQModel
from tinyldm.models.discriminator import PatchDiscriminator
from tinyldm.nn import no_grad
from tinyldm.nn.activations import silu
from tinyldm.nn.conv import conv2d
from tinyldm.training import adversarial, codebook, estimate, loop, networks, overfit, presets
from tinyldm.training import run as runs
from tinyldm.training.adversarial import (
    OF_ADVERSARIAL,
    OF_ERROR,
    discriminator_loss,
    with_discriminator,
)
from tinyldm.training.config import Config
from tinyldm.training.losses import (
    autoencoder_loss,
    perceptual_loss,
    squared_error,
    with_perception,
)
from tinyldm.training.signals import Stopped
from tinyldm.training.state import State, load_state, state_files
from tinyldm.training.step import stage_gradient

KERNELS = numbers("first", 3, 3, 3, 4), numbers("second", 3, 3, 4, 5)


def features(images):
    """Two maps (n, h', w', c) of an image, by two convolutions."""
    first, first_back = conv2d(images, KERNELS[0].astype(images.dtype), stride=2)
    bent, silu_back = silu(first)
    second, second_back = conv2d(bent, KERNELS[1].astype(images.dtype), stride=2)

    def backward(dmaps):
        dbent, *_ = second_back(dmaps[1], weights=False)
        return first_back(dmaps[0] + silu_back(dbent), weights=False)[0]

    return [first, second], backward


SIZES = {"block_out_channels": [2, 2], "latent_channels": 2, "norm_num_groups": 1,
         "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
         "mid_block_add_attention": False}  # fmt: skip
VAES = {"kl": AutoencoderKL(SIZES), "vq": VQModel(SIZES | {"num_vq_embeddings": 5})}
DISCRIMINATOR = PatchDiscriminator("discriminator", 3, 2, groups=1)
JUDGE = random_params(DISCRIMINATOR.shapes())
LAST = "decoder.conv_out.weight"


@pytest.fixture(params=VAES)
def first(request):
    """A first stage: its network, parameters, batch, and its loss by any criterion."""
    vae = VAES[request.param]
    batch = (numbers("images", 3, 16, 16, 3),)
    loss = partial(autoencoder_loss, weight=1.0)
    if request.param == "kl":
        batch = (*batch, numbers("noise", 3, 8, 8, 2))
        loss = partial(autoencoder_loss, weight=0.1)
    params = random_params(vae.shapes())
    return SimpleNamespace(vae=vae, params=params, batch=batch, loss=partial(loss, vae))


# -------------------------------------------------------------------------------------- perceptual


def test_perceptual_loss_equals_its_reference():
    made, real = numbers("made", 2, 7, 6, 3), numbers("real", 2, 7, 6, 3)
    loss, _ = perceptual_loss(features)(made, real)
    assert_near(loss, reference.perceptual_loss(features(made)[0], features(real)[0]))
    assert perceptual_loss(features)(real, real)[0] == 0


def test_gradients_of_the_perceptual_loss():
    distance = perceptual_loss(features)
    made, real = numbers("made", 2, 7, 6, 3), numbers("real", 2, 7, 6, 3)
    check(lambda made: distance(made, real), made)


def test_gradients_with_perception(first):
    criterion = with_perception(squared_error, features, 0.7)
    check_loss(first.loss(criterion=criterion), first.params, {}, first.batch)


def test_dloss_of_the_perceptual_loss_is_1_by_default():
    made, real = numbers("made", 2, 9, 7, 3), numbers("real", 2, 9, 7, 3)
    by_default, given = (perceptual_loss(features)(made, real)[1] for _ in range(2))
    np.testing.assert_array_equal(by_default(), given(1.0))


def test_gradients_with_perception_of_grey_images():
    made, real = numbers("made", 2, 6, 5, 1), numbers("real", 2, 6, 5, 1)

    def loss(made):
        loss, backward = with_perception(squared_error, features, 0.7)({}, made, real)
        return loss, lambda dloss: dloss * backward(None)

    check(loss, made)


# ------------------------------------------------------------------------------------- adversarial


def test_gradients_of_the_generators_loss(first):
    criterion = with_discriminator(squared_error, DISCRIMINATOR)
    batch = (*first.batch, np.full(3, 1.7))
    # Straight through a codebook a gradient is what the complex step is made to say.
    method = "auto" if first.batch[1:] else "complex"
    check_loss(first.loss(criterion=criterion), first.params, JUDGE, batch, method=method)


def test_gradients_of_the_discriminators_loss(first):
    loss_fn = discriminator_loss(first.vae, squared_error, DISCRIMINATOR)
    check_loss(loss_fn, JUDGE, first.params, first.batch)


def reconstruct(first, params):
    images, *noise = first.batch
    with no_grad():
        if noise:
            latents, _ = first.vae.to_latents(params, images, *noise)
            return first.vae.from_latents(params, latents)[0]
        return first.vae.decode(params, first.vae.encode(params, images)[0])[0]


def slow_last_gradients(first, of):
    """The derivative of `of(reconstruction)` along every entry of the last kernel, one by one."""
    found = np.zeros(first.params[LAST].shape)
    for at in np.ndindex(found.shape):
        moved = first.params[LAST].astype(complex)
        moved[at] += 1e-20j
        found[at] = of(reconstruct(first, first.params | {LAST: moved})).imag / 1e-20
    return found


@pytest.mark.slow
def test_the_adaptive_weight_equals_a_slow_direct_computation(first):
    images = first.batch[0]

    def error(x):
        return ((x - images) ** 2).mean()

    def fooling(x):
        with no_grad():
            return -DISCRIMINATOR(JUDGE, x)[0].mean()

    of_error, of_adversarial = (
        slow_last_gradients(first, error),
        slow_last_gradients(first, fooling),
    )
    expected = np.linalg.norm(of_error) / (np.linalg.norm(of_adversarial) + 1e-4)
    grads = {}
    discriminator_loss(first.vae, squared_error, DISCRIMINATOR)(first.params | JUDGE, *first.batch)[
        1
    ](grads)
    assert_near(grads[OF_ERROR], of_error)
    assert_near(grads[OF_ADVERSARIAL], of_adversarial)
    found = adversarial.adaptive_weight(grads[OF_ERROR], grads[OF_ADVERSARIAL])
    assert math.isclose(found, expected, rel_tol=1e-9)


def test_the_adaptive_weight_has_a_bound():
    assert adversarial.adaptive_weight(np.full(3, 1e9), np.zeros(3)) == 1e4
    assert adversarial.adaptive_weight(np.zeros(3), np.ones(3)) == 0
    assert math.isclose(adversarial.adaptive_weight(np.ones(1), np.zeros(1)), 1e4)


def adversarial_gradient(first, cores, parts, processes, monkeypatch):
    """Of one batch, by `stage_gradient` → loss, gradients, numbers for the log."""
    monkeypatch.setattr(parallel, "free_cores", lambda: cores)
    config = dataclasses.replace(CONFIG, adversarial=0.8)
    state = State(config, "autoencoder", first.params, None, "", total=0, discriminator=JUDGE)
    loss_fn = adversarial.Adversarial(
        first.loss(),
        first.loss(criterion=with_discriminator(squared_error, DISCRIMINATOR)),
        discriminator_loss(first.vae, squared_error, DISCRIMINATOR),
    )
    seen = {}
    with stage_gradient(loss_fn, state, parts, seen, processes) as gradient_of:
        loss, grads = gradient_of(first.batch)
        return loss, {name: dw.copy() for name, dw in grads.items()}, seen


@pytest.mark.slow
def test_a_split_batch_has_the_same_weight_and_gradients(first, monkeypatch):
    """Over threads, over processes, and in parts: but for rounding it is the whole's."""
    loss, grads, seen = adversarial_gradient(first, 1, 1, 1, monkeypatch)
    assert grads.keys() == first.params.keys() | JUDGE.keys()
    for cores, parts, processes in ((2, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 2), (1, 2, 2)):
        other = adversarial_gradient(first, cores, parts, processes, monkeypatch)
        assert_near(other[0], loss)
        for name, number in seen.items():
            assert_near(other[2][name], number)
        for name, dw in grads.items():
            assert_near(other[1][name], dw)


def test_the_weight_is_that_of_the_config_times_the_adaptive_one(first, monkeypatch):
    _, grads, seen = adversarial_gradient(first, 1, 1, 1, monkeypatch)
    criterion = with_discriminator(squared_error, DISCRIMINATOR)
    expected = {}
    weights = np.full(3, 0.8 * seen["adaptive_weight"])
    first.loss(criterion=criterion)(first.params | JUDGE, *first.batch, weights)[1](expected)
    for name in first.params:
        assert_near(grads[name], expected[name])
    scores = {}
    discriminator_loss(first.vae, squared_error, DISCRIMINATOR)(first.params | JUDGE, *first.batch)[
        1
    ](scores)
    norm = math.sqrt(sum((scores[name] ** 2).sum() for name in JUDGE))
    assert math.isclose(seen["discriminator_norm"], norm)
    for name in JUDGE:
        assert_near(grads[name], scores[name] * min(1, 1 / norm))


# -------------------------------------------------------------------------------------------- runs

ADVERSARIAL = dataclasses.replace(
    CONFIG, adversarial=0.5, denoiser=dataclasses.replace(STAGE, steps=1)
)
LAST_STATE = f"training/state-{STEPS + 1:08d}.safetensors"


@pytest.fixture
def every_step(monkeypatch):
    without_images(monkeypatch)
    monkeypatch.setattr(loop, "LOG_EVERY", 1)


def metrics_of(run):
    lines = (run / "training" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["stage"] == "autoencoder"]


def stopped_after(step, run, config, monkeypatch, **options):
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            runs.train(run, config, say=silent, **options)
    return load_state(run)


@pytest.mark.slow
def test_the_discriminator_begins_at_its_share_of_the_steps(tmp_path, every_step, monkeypatch):
    plain = stopped_after(STEPS, tmp_path / "plain", CONFIG, monkeypatch)
    state = stopped_after(STEPS // 2, tmp_path / "run", ADVERSARIAL, monkeypatch)
    fresh = networks.new_discriminator(networks.Models(state.config, state.tokenizer))
    for name, w in state.discriminator.items():
        np.testing.assert_array_equal(w, fresh[name])
    for moment in state.discriminator_moments.values():
        assert not moment.flat.any()
    runs.resume(tmp_path / "run", say=silent)
    before, after = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "run")
    assert [line["loss"] for line in after[:2]] == [line["loss"] for line in before[:2]]
    seen = {"discriminator", "discriminator_norm", "adaptive_weight"}
    assert [seen & line.keys() for line in after] == [set(), set(), seen, seen]
    assert 0.5 < after[2]["discriminator"] < 1.5
    assert after[3]["loss"] != before[3]["loss"]
    assert not plain.discriminator and not plain.discriminator_moments


@pytest.mark.slow
@pytest.mark.parametrize("first_stage", ["kl", "vq"])
def test_stopped_and_resumed_the_bytes_are_the_same(first_stage, tmp_path, every_step, monkeypatch):
    """In parts, from before the discriminator and with it; what is exported is without it."""
    stage = dataclasses.replace(STAGE, parts=2)
    config = dataclasses.replace(ADVERSARIAL, first_stage=first_stage, autoencoder=stage)
    whole, run = tmp_path / "whole", tmp_path / "run"
    runs.train(whole, config, say=silent)
    state = stopped_after(1, run, config, monkeypatch)
    for step in (3, 4):
        with monkeypatch.context() as patch:
            at_step(patch, step - state.step, lambda: signal.raise_signal(signal.SIGINT))
            with pytest.raises(Stopped):
                runs.resume(run, say=silent)
        state = load_state(run)
        assert (state.stage, state.step) == ("autoencoder", step)
        assert state.discriminator.keys() == state.discriminator_moments["v"].keys() != set()
        assert state.discriminator_moments["v"].flat.any()
    runs.resume(run, say=silent)
    for file in (LAST_STATE, "vae/diffusion_pytorch_model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
        assert not any("discriminator" in name for name in load_weights(run / file))
    assert [line["loss"] for line in metrics_of(run)] == [
        line["loss"] for line in metrics_of(whole)
    ]


def test_without_one_nothing_is_kept_of_it(tmp_path, every_step, monkeypatch):
    state = stopped_after(2, tmp_path / "run", CONFIG, monkeypatch)
    (file,) = state_files(tmp_path / "run")[-1:]
    assert {name.split("/")[0] for name in load_weights(file)} == {"params", "m", "v", "average"}
    content = dataclasses.asdict(state.config)
    for name in ("adversarial", "adversarial_start", "perceptual"):  # as of earlier versions
        del content[name]
    assert Config.from_json(content) == state.config


@pytest.mark.slow
def test_a_run_with_perception(tmp_path, every_step, monkeypatch):
    config = dataclasses.replace(ADVERSARIAL, perceptual=0.3)
    with pytest.raises(ConfigError, match="perceptual: .* found a weight of 0.3 and none"):
        networks.Models(config, Tokenizer.train([""])).first_stage_loss()
    with pytest.raises(ConfigError, match="a weight of 0 and one"):
        networks.Models(CONFIG, Tokenizer.train([""]), features).first_stage_loss()
    runs.train(tmp_path / "whole", config, say=silent, features=features)
    stopped_after(3, tmp_path / "run", config, monkeypatch, features=features)
    with pytest.raises(ConfigError, match="perceptual: expected"):
        runs.resume(tmp_path / "run", say=silent)
    runs.resume(tmp_path / "run", say=silent, features=features)
    both = [(tmp_path / name / LAST_STATE).read_bytes() for name in ("whole", "run")]
    assert both[0] == both[1]


def test_mean_seconds_of_both_kinds_of_steps():
    config = dataclasses.replace(ADVERSARIAL, adversarial_start=0.75)
    assert loop.mean_seconds(config, 2.0, 3.0) == 0.75 * 2 + 0.25 * 3


def test_dead_codes_are_looked_for_after_every_step(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(codebook, "due", lambda state: seen.append(state.step))
    without_images(monkeypatch)
    runs.train(tmp_path, dataclasses.replace(CONFIG, first_stage="vq"), say=silent)
    assert seen == list(range(1, STAGE.steps + 1))


@pytest.mark.slow
def test_seconds_count_both_kinds_of_steps(monkeypatch):
    config = dataclasses.replace(
        ADVERSARIAL,
        autoencoder=dataclasses.replace(STAGE, steps=None, seconds=100),
        adversarial_start=0.75,
    )
    times = iter([3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 5.0, 5.0])
    monkeypatch.setattr(estimate, "_timed", lambda function: (function(), next(times))[1])
    monkeypatch.setattr(estimate, "_encoding", lambda *args: (0.0, 0))
    found = estimate.estimate_run(config, 10, features=None, seconds=0)
    assert found.step_seconds == {"autoencoder": 0.75 * 1 + 0.25 * 3, "denoiser": 5}
    assert found.steps["autoencoder"] == 66
    now = iter([0, 7, 7, 7, 7, 16, 16, 18, 18, 20, 20, 21])
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(now)))
    state, totals = SimpleNamespace(total=None), []
    later = loop.seconds_with_discriminator(
        state, lambda batch: [totals.append(state.total) or 0], ()
    )
    assert (later, totals, state.total) == (2, [0] * 6, None)


@pytest.mark.parametrize("change", [{"first_stage": "none"}, {"side": 8}])
def test_where_there_can_be_no_discriminator(change):
    with pytest.raises(ConfigError, match="adversarial_start: expected 0…1, found 2"):
        Config(adversarial=0.5, adversarial_start=2)
    with pytest.raises(ConfigError, match="adversarial: expected an autoencoder .* 16 pixels"):
        dataclasses.replace(ADVERSARIAL, **change)


def test_from_the_command_line(call, tmp_path, every_step, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", CONFIG)
    run = tmp_path / "run"
    options = ("train", "--preset", "tiny", "--out", run)
    assert call(*options, "--adversarial", "0.25").code == 0
    assert load_state(run).config.adversarial == 0.25
    result = call("train", "--out", run, "--resume", "--adversarial", "1")
    assert result.code == 2 and "--adversarial 1.0: the run began with 0.25" in result.err
    assert call(*options[:3], "--adversarial", "-1").code == 2
    monkeypatch.setattr(overfit, "load_data", None)
    result = call("train", "--preset", "tiny", "--overfit", "--adversarial", "1")
    assert result.code == 2 and "two networks contend" in result.err
