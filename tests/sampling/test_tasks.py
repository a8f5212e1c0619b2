"""Conditioning by concatenation: what a U-Net is given of an image, in training and after."""

import dataclasses
import json
import math

import numpy as np
import pytest
from gradients import check_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import numbers, random_params
from PIL import Image
from small_model import CONFIG as SMALL
from small_run import (
    CONFIG,
    STEPS,
    assert_goes_on_alike,
    silent,
    without_estimate,
    without_images,
)

from tinyldm.cli import evaluate as commands
from tinyldm.config import ConfigError
from tinyldm.data.dataset import DataError, Dataset
from tinyldm.data.folder import load_folder
from tinyldm.data.shapes import Attributes, make_shapes
from tinyldm.evaluation import metrics, scenes
from tinyldm.evaluation.metrics import evaluate
from tinyldm.evaluation.reader import box_around, score
from tinyldm.evaluation.statistics import psnr
from tinyldm.evaluation.table import table
from tinyldm.models import Tokenizer
from tinyldm.sampling.init_image import Scene
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.sampling.tasks import (
    TASKS,
    concat_channels,
    random_masks,
    reduced,
    stretched,
    task_of,
    times_larger,
)
from tinyldm.training import overfit, stages
from tinyldm.training import run as runs
from tinyldm.training.latents import conditioner
from tinyldm.training.networks import Models, denoiser_loss
from tinyldm.training.preparation import load_data
from tinyldm.training.state import load_state

CONFIGS = {task: dataclasses.replace(CONFIG, task=task) for task in TASKS[1:]}
CAPTION = "a large red circle on blue at the left"


@pytest.fixture(params=CONFIGS)
def task(request):
    return request.param


# ----------------------------------------------------------------------------------- what is given


@given(seed=st.integers(0, 2**32 - 1), h=st.integers(8, 40), w=st.integers(8, 40))
def test_masks_hide_a_part_or_all(seed, h, w):
    masks = random_masks(np.random.default_rng(seed), 30, h, w)
    assert masks.shape == (30, h, w) and masks.dtype == bool
    shares = masks.mean(axis=(1, 2))
    # The smallest rectangle is a quarter of each side, rounded down.
    assert (h // 4) * (w // 4) / (h * w) <= shares.min()
    again = random_masks(np.random.default_rng(seed), 30, h, w)
    np.testing.assert_array_equal(masks, again)


def test_a_quarter_of_the_masks_hides_all():
    masks = random_masks(np.random.default_rng(0), 2000, 32, 32)
    assert abs((masks.mean(axis=(1, 2)) == 1).mean() - 0.25) < 0.05


def test_smaller_and_larger_again():
    images, _ = make_shapes(4, 32, 0)
    small = reduced(images, 4)
    assert small.shape == (4, 8, 8, 3) and small.dtype == np.uint8
    flat = np.full((2, 8, 12, 3), 77, np.uint8)
    np.testing.assert_array_equal(stretched(flat, 16, 6), np.full((2, 16, 6, 3), 77))
    expected = Image.fromarray(images[1]).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(small[1], expected)
    with pytest.raises(ValueError, match="sides that 4 divides, found 6×8"):
        reduced(np.zeros((1, 6, 8, 3), np.uint8), 4)


def test_a_map_shows_where_the_shape_is_and_which():
    images, captions = make_shapes(60, 32, 5)
    maps, same = make_shapes(60, 32, 5, maps=True)
    assert captions == same
    for image, layout, caption in zip(images, maps, captions, strict=True):
        said = Attributes.parse(caption)
        assert score([layout], [said.on_map.caption])["all"] == 1
        np.testing.assert_array_equal(box_around(image, 0), box_around(layout, 0))


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_the_box_holds_the_shape_and_little_else(seed):
    (image,), (caption,) = make_shapes(1, 32, seed)
    box = box_around(image, scenes.AROUND)
    assert (image[~box] == image[0, 0]).all()
    r = {"small": 0.17, "large": 0.3}[Attributes.parse(caption).size] * 32
    assert box.sum() <= (2 * r + 2 * scenes.AROUND + 3) ** 2


def test_channels_say_the_task():
    for task in TASKS:
        said = task if task in TASKS[2:] else None
        assert task_of(4 + concat_channels(task, 4), 4, said) == task
    assert [concat_channels(task, 4) for task in TASKS] == [0, 5, 4, 4, 4]
    assert [times_larger(task) for task in TASKS] == [1, 1, 2, 4, 1]
    for channels, said in ((8, None), (7, None), (8, "inpainting"), (7, "layout")):
        with pytest.raises(ConfigError, match=f"in_channels = {channels} is not implemented"):
            task_of(channels, 4, said)
    with pytest.raises(ConfigError, match="did you mean 'layout'"):
        task_of(8, 4, "layouts")


def test_an_example_of_each_task(task):
    images, _ = make_shapes(3, 16, 0)
    maps, _ = make_shapes(3, 16, 0, maps=True)
    scene = Scene.example(task, images, maps, np.random.default_rng(0))
    if task == "inpainting":
        np.testing.assert_array_equal(scene.images, images)
        assert scene.mask.any(axis=(1, 2)).all()
    else:
        assert scene.mask is None and scene.images.shape == images.shape
    if task == "layout":
        np.testing.assert_array_equal(scene.images, maps)
    if task.startswith("upscaling"):
        small = reduced(images, times_larger(task))
        task_input = [Image.fromarray(image) for image in small]
        recipe = type("Recipe", (), {"prompts": "abc", "height": 16, "width": 16})
        np.testing.assert_array_equal(Scene.of(task_input, None, recipe, task).images, scene.images)


def test_the_u_net_sees_hidden_parts_as_grey_and_knows_where():
    images, _ = make_shapes(2, 16, 0)
    mask = np.zeros((2, 16, 16), bool)
    mask[:, 4:10, :6] = True
    seen = Scene(images, mask).concat_conditioning(
        "inpainting", lambda pixels: pixels[:, ::2, ::2], 2
    )
    assert seen.shape == (2, 8, 8, 4)
    np.testing.assert_array_equal(seen[..., 0], mask[:, ::2, ::2])
    assert (seen[:, 2:5, :3, 1:] == 0).all()
    np.testing.assert_allclose(seen[:, 5:, :, 1:], images[:, 10::2, ::2] / 127.5 - 1, atol=1e-6)


# ---------------------------------------------------------------------------------------- training


def test_masks_smaller_than_a_latent_are_harmless_in_training(tmp_path, monkeypatch):
    """Where a latent is as large as the smallest mask, some masks hide none."""
    without_images(monkeypatch)
    widths = (4, 4, 8, 8)  # f = 8 of 16 pixels, of which a mask may be four
    config = dataclasses.replace(CONFIGS["inpainting"], vae_widths=widths)
    runs.train(tmp_path / "run", config, say=silent)
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 1:5, 1:5] = True
    scene = Scene(np.zeros((1, 16, 16, 3), np.uint8), mask)
    assert not scene.latent_mask(8).any()


@pytest.mark.slow
def test_gradients_of_the_loss(task):
    tokenizer = Tokenizer.train(["a cat"] * 2, 600, CONFIG.tokens)
    models = Models(CONFIGS[task], tokenizer)
    params = random_params(models.unet.shapes() | models.text.shapes(), task)
    conditioner = concat_channels(task, 4)
    assert params["conv_in.weight"].shape[2] == 4 + conditioner
    z, noise = numbers("z", 2, 4, 4, 4), numbers("noise", 2, 4, 4, 4)
    seen, t = numbers("seen", 2, 4, 4, conditioner), np.array([10, 800])
    ids = tokenizer(["a cat", ""])
    loss_fn = denoiser_loss(models, lambda shown: shown)
    check_loss(loss_fn, params, {}, (z, noise, ids, t, seen))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(task)` → folder and pipeline of a short run."""
    found = {}

    def train(task):
        if task not in found:
            run = tmp_path_factory.mktemp("tasks") / task
            with pytest.MonkeyPatch.context() as patch:
                without_estimate(patch)
                found[task] = run, runs.train(run, CONFIGS[task], say=silent)
        return found[task]

    return train


def batches(task, run):
    config, state = CONFIGS[task], load_state(run)
    models = Models(config, state.tokenizer)
    training, held_out = commands.split(load_data(config), config)
    job = stages.Run(run, state, models, training, held_out, "cpu", silent).job()
    batch_at = job.batch_at
    return batch_at, conditioner(state, models), training


@pytest.mark.slow
def test_in_training_the_u_net_sees_what_it_sees_later(task, trained):
    """The concatenation conditioning of a batch equals the pipeline's for the same images."""
    run, pipeline = trained(task)
    batch_at, conditioner_of, training = batches(task, run)
    z, _, _, _, *shown = batch_at(3)
    seen = conditioner_of(*shown)
    rng = np.random.default_rng((CONFIG.seed, 4, 3))
    chosen = rng.integers(0, len(training), 4)
    some = training.pick(chosen)
    if task == "inpainting":  # its masks come after all else that a batch draws
        rng.standard_normal((2, *z.shape), dtype=np.float32)
        rng.integers(0, 1000, 4), rng.random(4)
    scene = Scene.example(task, some.images, some.maps, rng)
    expected = scene.concat_conditioning(task, pipeline.to_latents, pipeline.vae.factor)
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-5)
    for one, other in zip(batch_at(3), batch_at(3), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_run_leaves_a_model_that_does_its_task(task, trained):
    run, pipeline = trained(task)
    loaded = Pipeline.load(run)
    assert loaded.task == pipeline.task == task
    side = 16 // times_larger(task)
    image = Image.fromarray(make_shapes(1, 16, 3)[0][0]).resize((side, side))
    mask = Image.fromarray(np.eye(16, dtype=np.uint8)[::-1].cumsum(1, dtype=np.uint8) * 255)
    task_input = {"image": image} | ({"mask": mask} if task == "inpainting" else {})
    (one,), (other,) = pipeline(CAPTION, **task_input), loaded(CAPTION, **task_input)
    assert one.tobytes() == other.tobytes() and one.size == (16, 16)
    index = json.loads((run / "model_index.json").read_text())
    usual = "StableDiffusionInpaintPipeline" if task == "inpainting" else "TinyLDMPipeline"
    assert index["_class_name"] == usual
    for name in ("samples.png", "reverse.png", "loss-denoiser.png"):
        assert (run / "samples" / name).exists()
    # given, generated and true, below each other
    with Image.open(run / "samples" / "samples.png") as sheet:
        width, height = sheet.size
    assert height > 3 * 16 and width > 2 * 16
    assert (run / "samples" / "maps.png").exists() == (task == "layout")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["inpainting", "upscaling-4"])
def test_stopped_and_resumed_the_bytes_are_the_same(task, tmp_path, monkeypatch):
    assert_goes_on_alike(CONFIGS[task], STEPS + 2, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_task_with_each_first_stage_and_condition(tmp_path, monkeypatch):
    without_images(monkeypatch)
    for i, changes in enumerate(
        [
            {"task": "upscaling-2", "first_stage": "none", "condition": "none"},
            {"task": "inpainting", "first_stage": "vq", "condition": "class-time"},
            {"task": "layout", "condition": "class-token", "flip": True},
        ]
    ):
        run = tmp_path / str(i)
        runs.train(run, dataclasses.replace(CONFIG, **changes), say=silent)
        pipeline = Pipeline.load(run)
        assert pipeline.task == changes["task"]
        prompt = {"none": ""}.get(changes["condition"], "square")
        task_input = {"image": Image.new("RGB", (16, 16), "red")}
        if changes["task"] == "inpainting":
            mask = np.zeros((16, 16), np.uint8)
            mask[4:12, 4:12] = 255
            task_input["mask"] = Image.fromarray(mask)
        (one,), (other,) = (
            pipeline(prompt, size=16, **task_input | {"image": image})
            for image in (task_input["image"], Image.new("RGB", (16, 16), "white"))
        )
        assert one.size == (16, 16)
        # What is given decides what is generated: a U-Net that begins with zeros in its last
        # convolution has learnt that much in four steps.
        assert np.asarray(one).tobytes() != np.asarray(other).tobytes()


# ----------------------------------------------------------------------------- generating, scoring


def test_a_small_image_becomes_so_many_times_larger(trained):
    _, pipeline = trained("upscaling-4")
    assert pipeline.size_like(6, 4) == (24, 16)
    (image,) = pipeline("", image=Image.new("RGB", (5, 7)))
    assert image.size == (20, 28)
    with pytest.raises(ValueError, match="300×40 pixels would become 1200×160; give a smaller"):
        pipeline("", image=Image.new("RGB", (40, 300)))
    with pytest.raises(ValueError, match="multiples of 4, found 18×18"):
        pipeline("", image=Image.new("RGB", (4, 4)), size=18)


def test_what_is_missing_or_out_of_place(trained):
    _, pipeline = trained("layout")
    image = Image.new("RGB", (16, 16))
    with pytest.raises(ValueError, match="image: expected one, which the task layout"):
        pipeline(CAPTION)
    for more in ({"mask": image}, {"strength": 0.5}):
        with pytest.raises(ValueError, match="not for layout, which needs all of the image"):
            pipeline(CAPTION, image=image, **more)


def test_sampling_from_the_command_line_and_reproduced(trained, tmp_path, call):
    run, pipeline = trained("upscaling-2")
    small = tmp_path / "small.png"
    Image.fromarray(make_shapes(1, 16, 3)[0][0]).resize((8, 8)).save(small)
    first = call("sample", run, "--image", small, "-o", tmp_path / "large.png")
    assert first.code == 0
    expected = np.asarray(pipeline("", image=Image.open(small))[0])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "large.png")), expected)
    again = call("sample", run, "--reproduce", tmp_path / "large.png")
    assert again.code == 0
    both = [(tmp_path / name).read_bytes() for name in ("large.png", "large-reproduced.png")]
    assert both[0] == both[1]
    wrong = call("sample", run, "", "--image", small, "--strength", "0.5", "-o", tmp_path / "x.png")
    assert wrong.code == 2 and "not for upscaling-2" in wrong.err
    assert wrong.err.count("\n") == 1 and not (tmp_path / "x.png").exists()
    missing = call("sample", run, "a caption", "-o", tmp_path / "x.png")
    assert missing.code == 2 and "image: expected one" in missing.err


@pytest.mark.slow
def test_scoring_a_task(task, trained):
    _, pipeline = trained(task)
    config = CONFIGS[task]
    training, held_out = commands.split(load_data(config), config)
    shapes = commands.prompts_of(config)
    result, images = evaluate(pipeline, training, held_out, 4, shapes=shapes)
    found = result["task"]
    assert found["name"] == task and set(result["seen"]) > {"colour", "all"}
    assert task in table(result) and "held_out" not in result
    truth = held_out.pick([i % len(held_out) for i in range(4)])
    scene = scenes.task_input(task, truth, shapes=True)
    generated = scenes.generate(pipeline, list(truth.captions), scene, seed=metrics.SEED)
    if task == "inpainting":
        one_by_one = [
            10 * math.log10(255**2 / max(1e-10, np.square(made[~mask] - true[~mask]).mean()))
            for made, true, mask in zip(
                generated.astype(float), truth.images.astype(float), scene.mask, strict=True
            )
        ]
        assert math.isclose(found["psnr_seen"], np.mean(one_by_one))
    else:
        assert math.isclose(found["psnr"], psnr(generated, truth.images).mean())
        assert math.isclose(found["psnr_given"], psnr(scene.images, truth.images).mean())
    assert result["seen"] == score(generated, truth.captions)
    assert images["samples"].shape[1:] == (16, 16, 3)


def test_a_perfect_model_scores_best(monkeypatch, trained):
    """Were the true images generated, nothing would be lost but what the first stage loses."""
    _, pipeline = trained("upscaling-4")
    config = CONFIGS["upscaling-4"]
    training, held_out = commands.split(load_data(config), config)
    truth = iter([held_out.images[[i % len(held_out) for i in range(4)]]])
    monkeypatch.setattr("tinyldm.evaluation.metrics.generate", lambda *args, **options: next(truth))
    result, _ = evaluate(pipeline, training, held_out, 4, shapes=commands.prompts_of(config))
    assert result["task"]["psnr"] > 100 and result["task"]["ssim"] == 1
    assert 10 < result["task"]["psnr_given"] < 40
    assert result["seen"] == result["reader"]


def test_the_hidden_part_of_shapes_is_the_shape():
    images, captions = make_shapes(8, 32, 0)
    data = Dataset(images, captions, captions)
    scene = scenes.task_input("inpainting", data, shapes=True)
    shown = scenes.masked_images(scene)
    for i in range(8):
        ground = data.images[i, 0, 0]
        assert (shown[i][~scene.mask[i]] == ground).all()
    assert scenes.task_input("generation", data) is None


# -------------------------------------------------------------------------------------- own layouts


def test_maps_lie_beside_the_images_of_a_folder(tmp_path):
    images, _ = make_shapes(3, 16, 0)
    maps, _ = make_shapes(3, 16, 0, maps=True)
    for i in range(3):
        Image.fromarray(images[i]).save(tmp_path / f"{i}[a].png")
        Image.fromarray(maps[i]).save(tmp_path / f"{i}[a].map.png")
        (tmp_path / f"{i}[a].txt").write_text(f"caption {i}")
    data = load_folder(tmp_path, 16, maps=True)
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.maps, maps)
    assert data.captions == [f"caption {i}" for i in range(3)]
    assert len(load_folder(tmp_path, 16)) == 6  # without the task they are images like others
    mirrored = data.pick([2, 0]).with_mirror_images()
    np.testing.assert_array_equal(mirrored.maps[2], maps[2][:, ::-1])
    assert data.fingerprint() != dataclasses.replace(data, maps=None).fingerprint()
    (tmp_path / "1[a].map.png").unlink()
    with pytest.raises(DataError, match=r"has no map; expected 1\[a\].map.png beside it"):
        load_folder(tmp_path, 16, maps=True)
    assert len(load_folder(tmp_path, 16, skip_bad=True, maps=True)) == 2


def test_layout_of_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 16, 16, 3), np.uint8))
    config = dataclasses.replace(CONFIGS["layout"], data=str(tmp_path))
    with pytest.raises(DataError, match="layout needs maps"):
        load_data(config)


def test_few_held_out_images_are_generated_more_than_once(trained):
    _, pipeline = trained("upscaling-2")
    images, captions = make_shapes(9, 16, 3)
    data = Dataset(images, captions, captions)
    result, pairs = evaluate(pipeline, data, data.pick([0]), 5)
    assert len(pairs["samples"]) == 5 and result["frechet"]["generated"] >= 0


def test_a_size_that_cannot_be_reduced_is_refused_at_once():
    with pytest.raises(ConfigError, match="size: expected a multiple of 4 .* found 18"):
        dataclasses.replace(CONFIGS["upscaling-4"], side=18, first_stage="none")


def test_overfitting_learns_of_all_classes(tmp_path):
    """Files lie sorted by class: the first eight of them are of one."""
    images, _ = make_shapes(20, 16, 0)
    for i, image in enumerate(images):
        folder = tmp_path / ("cat" if i < 10 else "dog")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    config = dataclasses.replace(CONFIG, data=str(tmp_path), condition="class-token")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overfit, "STEPS", 2)
        losses = overfit.overfit(config, "cpu", silent)
    assert set(losses) == {"autoencoder", "denoiser"}


@pytest.mark.slow
def test_classes_that_sound_like_shapes_are_not_read_back(tmp_path):
    """A folder of one's own: nothing is scored, whatever its images are called."""
    rng = np.random.default_rng(0)
    for name in ("circle", "square"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            noise = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / name / f"{i}.png")
    config = dataclasses.replace(CONFIGS["inpainting"], data=str(tmp_path / "data"))
    runs.train(tmp_path / "run", config, say=silent)
    lines = (tmp_path / "run" / "training" / "metrics.jsonl").read_text()
    assert "by_noise" in lines and '"right"' not in lines


def test_a_map_has_the_proportions_of_its_image(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.map.png")
    (tmp_path / "a.map.json").write_text("{}")
    with pytest.raises(DataError, match="expected the proportions of its image, 10×20"):
        load_folder(tmp_path, 16, maps=True)
    Image.new("RGB", (40, 20)).save(tmp_path / "a.map.png")
    assert load_folder(tmp_path, 16, maps=True).maps.shape == (1, 16, 16, 3)


def test_a_run_goes_on_with_its_own_task(trained):
    run, _ = trained("layout")
    with pytest.raises(ConfigError, match="--task inpainting: the run began with layout"):
        runs.resume(run, task="inpainting", say=silent)
    with pytest.raises(ConfigError, match="task: expected generation"):
        dataclasses.replace(SMALL, task="upscaling")
