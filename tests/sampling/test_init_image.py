"""Beginning with an image: strength, masks, inpainting models, variations, rescale, callbacks."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image
from slow import mostly_slow
from small_model import PROMPTS, STEPS, generate, make_pipeline, start_noise

from tinyldm.data.images import as_rgb, from_uint8, image_pixels, mask_pixels, similar_size
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.sampling.init_image import Entry, Scene


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def inpainting_pipe():
    return make_pipeline(in_channels=9)


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask():
    """White in the left half."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, :8] = 255
    return Image.fromarray(pixels)


# ----------------------------------------------------------------------------------------- strength


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "strength, taken",
    mostly_slow([(0.1, 1), (0.25, 2), (0.58, 5), (0.99, 9), (1, 10)], (0.25, 2)),
)
def test_strength_is_the_share_of_the_steps_that_is_gone(pipe, image, sampler, strength, taken):
    steps = []
    pipe(
        PROMPTS[0], image=image, strength=strength, steps=10, sampler=sampler,
        callback=lambda i, x, x0: steps.append(i),
    )  # fmt: skip
    assert steps == list(range(taken))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sketch_enters_with_the_noise_of_its_step(pipe, image, sampler, monkeypatch):
    """x = a z + s ε, where z are the means of the latents and ε is the noise of the seed."""
    seen = {}

    def spy(predict, schedule, x, steps, **options):
        seen.update(x=x, steps=steps, start=options["span"].start)
        return iter([(x, x)])

    monkeypatch.setitem(SAMPLERS, sampler, dataclasses.replace(SAMPLERS[sampler], function=spy))
    recipe = pipe.sampling_params(PROMPTS[:2], steps=10, seed=4, sampler=sampler, strength=0.3)
    scene = Scene.of(image, None, recipe)
    list(pipe.denoise(recipe, None, scene))
    z = pipe.encode(np.stack([np.asarray(image)] * 2))
    alpha_bar = SAMPLERS[sampler].levels(pipe.schedule, 10)[7]
    expected = math.sqrt(alpha_bar) * z + math.sqrt(1 - alpha_bar) * start_noise(2, 4)
    assert (seen["steps"], seen["start"]) == (10, 7)
    np.testing.assert_allclose(seen["x"], expected, atol=1e-6)


def test_strength_is_0_8_by_default_and_1_with_a_mask(pipe, image, mask):
    usual = generate(pipe, PROMPTS[0], image=image, steps=10)
    np.testing.assert_array_equal(
        usual, generate(pipe, PROMPTS[0], image=image, steps=10, strength=0.8)
    )
    usual = generate(pipe, PROMPTS[0], image=image, mask=mask, steps=10)
    np.testing.assert_array_equal(
        usual, generate(pipe, PROMPTS[0], image=image, mask=mask, steps=10, strength=1.0)
    )


def test_each_prompt_can_have_an_image_of_its_own(pipe, image):
    other = image.rotate(90)
    both = generate(pipe, PROMPTS[:2], image=[image, other])
    np.testing.assert_array_equal(both, generate(pipe, PROMPTS[:2], image=(image, other)))
    assert abs(both[0].astype(int) - generate(pipe, PROMPTS[0], image=image)[0]).max() <= 1
    assert (both[1] != generate(pipe, PROMPTS[:2], image=image)[1]).any()


@pytest.mark.parametrize(
    "size, given, expected",
    [
        ((16, 16), None, (16, 16)),
        ((300, 100), None, (8, 28)),  # proportions stay as far as whole halves allow
        ((300, 100), (24, 8), (24, 8)),
    ],
)
def test_the_size_is_that_of_the_model_in_the_proportions_of_the_image(
    pipe, image, size, given, expected
):
    (generated,) = generate(pipe, PROMPTS[0], image=image.resize(size), size=given)
    assert generated.shape == (*expected, 3)


def test_similar_sizes():
    assert similar_size((1000, 1000), (512, 512), 64) == (512, 512)
    assert similar_size((3024, 4032), (512, 512), 64) == (448, 576)
    assert similar_size((10, 4000), (512, 512), 64) == (64, 4096)
    assert similar_size((16384, 1), (512, 512), 64) == (4096, 64)


# --------------------------------------------------------------------------------------- inpainting


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", mostly_slow([0.5, 1.0], 0.5))
def test_any_model_keeps_what_is_not_hidden(pipe, image, mask, sampler, strength):
    """After each step the known part has the noise of that step, after the last none."""
    recipe = pipe.sampling_params(PROMPTS[:2], steps=8, seed=1, sampler=sampler, strength=strength)
    scene = Scene.of(image, mask, recipe)
    z = pipe.encode(scene.images)
    alphas_bar = [*SAMPLERS[sampler].levels(pipe.schedule, 8)[8 - recipe.steps_taken :][1:], 1.0]
    path = [x for x, _ in pipe.denoise(recipe, None, scene)]
    assert len(path) == len(alphas_bar) == recipe.steps_taken
    for x, alpha_bar in zip(path, alphas_bar, strict=True):
        known = math.sqrt(alpha_bar) * z + math.sqrt(1 - alpha_bar) * start_noise(2, 1)
        np.testing.assert_allclose(x[:, :, 4:], known[:, :, 4:], atol=1e-5)
        assert (abs(x - known)[:, :, :4] > 1e-3).mean() > 0.9


def test_the_known_part_decides_what_is_generated_beside_it(pipe, image, mask):
    recipe = pipe.sampling_params(PROMPTS[0], steps=8, strength=1.0)
    ends = []
    for one in (image, image.rotate(180)):
        *_, (x, _) = pipe.denoise(recipe, None, Scene.of(one, mask, recipe))
        ends.append(x[:, :, :4])
    assert abs(ends[0] - ends[1]).max() > 1e-3


def spied(pipe, monkeypatch):
    """What the U-Net sees."""
    seen = []
    unet = pipe.unet
    monkeypatch.setenv("TINYLDM_PROCESSES", "1")

    class Spy:
        config = unet.config

        def __call__(self, params, x, t, context):
            seen.append(x)
            return unet(params, x, t, context)

    monkeypatch.setattr(pipe, "unet", Spy())
    monkeypatch.setattr("tinyldm.kernels.shared_steps.cores", lambda: 1)
    return seen


@pytest.mark.parametrize("guidance", [1, 3])
def test_a_model_that_inpaints_sees_mask_and_rest(
    inpainting_pipe, image, mask, monkeypatch, guidance
):
    pipe = inpainting_pipe
    seen = spied(pipe, monkeypatch)
    recipe = pipe.sampling_params(PROMPTS[:2], steps=3, guidance=guidance, strength=1.0)
    path = list(pipe.denoise(recipe, None, Scene.of(image, mask, recipe)))
    pixels = from_uint8(np.asarray(image)[None])
    pixels[:, :, :8] = 0  # grey
    rest, _ = pipe.vae.to_latents(pipe.params["vae"], pixels)
    assert len(seen) == len(path) == 3
    for x in seen:
        assert x.shape == (2 if guidance == 1 else 4, 8, 8, 9)
        assert (x[:, :, :4, 4] == 1).all() and (x[:, :, 4:, 4] == 0).all()
        np.testing.assert_allclose(x[..., 5:], np.repeat(rest, len(x), axis=0), atol=1e-5)
    np.testing.assert_array_equal(seen[0][:2, ..., :4], start_noise(2))
    np.testing.assert_array_equal(seen[1][:2, ..., :4], path[0][0])


@pytest.mark.parametrize(
    "channels, strength, masked, times",
    [(4, 0.5, False, 1), (4, 1.0, True, 1), (9, 1.0, True, 1), (9, 0.5, True, 2)],
)
def test_one_image_for_all_is_encoded_no_more_often_than_needed(
    pipe, inpainting_pipe, image, mask, monkeypatch, channels, strength, masked, times
):
    """A model that inpaints from pure noise needs no latents of the whole image."""
    one = {4: pipe, 9: inpainting_pipe}[channels]
    seen = []
    encode = one.vae.to_latents
    monkeypatch.setattr(
        one.vae, "to_latents", lambda params, x: seen.append(len(x)) or encode(params, x)
    )
    one(PROMPTS, image=image, mask=mask if masked else None, strength=strength)
    assert seen == [1] * times


@pytest.mark.parametrize("given", [False, True], ids=["text alone", "a sketch"])
def test_to_a_model_that_inpaints_all_is_hidden_without_a_mask(
    inpainting_pipe, image, monkeypatch, given
):
    pipe = inpainting_pipe
    seen = spied(pipe, monkeypatch)
    pipe(PROMPTS[0], guidance=1, **({"image": image} if given else {}))
    grey, _ = pipe.vae.to_latents(pipe.params["vae"], np.zeros((1, 16, 16, 3), np.float32))
    assert len(seen) == (int(0.8 * STEPS) if given else STEPS)
    for x in seen:
        assert (x[..., 4] == 1).all()
        np.testing.assert_allclose(x[..., 5:], grey, atol=1e-5)


def test_a_mask_between_the_latents_is_told(pipe, image):
    thin = np.zeros((16, 16), np.uint8)
    thin[:, 3] = 255
    with pytest.raises(ValueError, match="mask: expected white areas of 2 pixels or more"):
        pipe(PROMPTS[0], image=image, mask=Image.fromarray(thin))


@pytest.mark.parametrize("tile", [0, 16, None])
def test_tiles_are_those_of_the_encoder_too(pipe, image, tile, monkeypatch):
    sides = []
    encode = pipe.vae.to_latents

    def spy(params, x):
        sides.append(x.shape[1:3])
        return encode(params, x)

    monkeypatch.setattr(pipe.vae, "to_latents", spy)
    monkeypatch.setattr("tinyldm.sampling.tiling.WHOLE", 20)
    monkeypatch.setattr("tinyldm.sampling.tiling.TILE", 24)
    pipe(PROMPTS[0], image=image, size=48, tile=tile)
    assert set(sides) == {{0: (48, 48), 16: (16, 16), None: (24, 24)}[tile]}


def test_images_of_other_kinds():
    """The same that the command line makes of their files."""
    deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert (image_pixels(deep, 4, 4) == 127).all() or (image_pixels(deep, 4, 4) == 128).all()
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (image_pixels(clear, 4, 4) == 255).all()
    assert not mask_pixels(clear, 4, 4).any()  # what is transparent is not masked
    turned = Image.new("RGB", (6, 4))
    turned.getexif()[0x0112] = 6
    assert as_rgb(turned).size == (4, 6)
    with pytest.raises(ValueError, match="mode F"):
        mask_pixels(Image.new("F", (4, 4)), 4, 4)


def test_masks_and_images_as_numbers(image):
    gray = Image.fromarray(np.uint8([[0, 127, 128, 255]]))
    assert mask_pixels(gray, 1, 4).tolist() == [[False, False, True, True]]
    assert mask_pixels(gray.convert("RGB"), 1, 4).tolist() == [[False, False, True, True]]
    np.testing.assert_array_equal(image_pixels(image, 16, 16), np.asarray(image))
    assert image_pixels(gray, 6, 2).shape == (6, 2, 3)


# -------------------------------------------------------------------------- variations and the rest


@pytest.fixture
def start(pipe, monkeypatch):
    """start(**options) → the noise from which three images start."""
    starts = []

    def spy(recipe, scene, x, *rest):
        starts.append(x)
        return Entry(x)

    monkeypatch.setattr("tinyldm.sampling.pipeline.enter", spy)

    def start_of(**options):
        list(pipe.denoise(pipe.sampling_params(PROMPTS[:3], steps=1, **options)))
        return starts[-1]

    return start_of


def test_variations_begin_at_one_noise_and_go_ways_of_their_own(start):
    first = start_noise(1, 5)
    np.testing.assert_array_equal(start(seed=5), start_noise(3, 5))
    np.testing.assert_allclose(start(seed=5, variation=0.0), first.repeat(3, axis=0), atol=1e-6)
    ends = start(seed=5, variation=1, variation_seed=9)
    assert ends.dtype == np.float32 and len({x.tobytes() for x in ends}) == 3
    half = start(seed=5, variation=0.5, variation_seed=9)
    for end, x in zip(ends, half, strict=True):
        assert abs(np.linalg.norm(x - first) - np.linalg.norm(x - end)) < 0.05 * np.linalg.norm(x)
    again = start(seed=6, variation=1, variation_seed=9)
    np.testing.assert_allclose(again, ends, atol=1e-6)  # they do not depend on where it begins


@pytest.mark.parametrize("seed", [0, 3])
def test_a_variation_differs_whatever_the_seeds_are(start, seed):
    """Also where both seeds are the same, as they are by default."""
    first = start_noise(1, seed)
    moved = start(seed=seed, variation=0.5, variation_seed=seed)
    for x in moved:
        assert abs(x - first).mean() > 0.2


@pytest.mark.parametrize("sampler", mostly_slow(SAMPLERS, "ddpm", "ddim"))
def test_a_tiny_variation_is_a_tiny_change(pipe, sampler):
    """Noise on the way is that of the first image, too."""
    options = {"seed": 4, "sampler": sampler}
    first = generate(pipe, PROMPTS[0], **options)
    for image in generate(pipe, [PROMPTS[0]] * 3, variation=1e-5, **options):
        assert abs(image.astype(int) - first[0]).max() <= 1


def test_a_callback_sees_every_step(pipe):
    seen = []
    pipe(PROMPTS[:2], steps=4, seed=2, callback=lambda *args: seen.append(args))
    path = list(pipe.denoise(pipe.sampling_params(PROMPTS[:2], steps=4, seed=2)))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    for (_, *found), expected in zip(seen, path, strict=True):
        np.testing.assert_array_equal(found, expected)

    def stop(i, x, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPTS[0], callback=stop)


def test_tiles_are_passed_on(pipe, monkeypatch):
    sides = []
    decode = pipe.vae.from_latents

    def spy(params, z):
        sides.append(z.shape[1:3])
        return decode(params, z)

    monkeypatch.setattr(pipe.vae, "from_latents", spy)
    whole = generate(pipe, PROMPTS[0], size=(32, 48))
    assert sides == [(16, 24)]
    np.testing.assert_array_equal(whole, generate(pipe, PROMPTS[0], size=(32, 48), tile=0))
    tiles = generate(pipe, PROMPTS[0], size=(32, 48), tile=16)
    assert set(sides[2:]) == {(8, 8)} and tiles.shape == whole.shape
    monkeypatch.setattr("tinyldm.sampling.tiling.WHOLE", 30)
    monkeypatch.setattr("tinyldm.sampling.tiling.TILE", 24)
    generate(pipe, PROMPTS[0], size=(32, 48))
    assert sides[-1] == (12, 12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strength": 0.5, "size": None}, "expected an image"),
        ({"mask": Image.new("L", (8, 8), 255)}, "expected an image"),
        ({"image": "photo.png"}, "image: .* PIL image, or 1 for 1 prompts, found 'photo.png'"),
        ({"image": "photo.png", "size": None}, "image: expected a PIL image, .*found 'photo.png'"),
        ({"image": [], "size": None}, "image: expected .* found 0"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "size": None}, "found 8 ndarray"),
        ({"image": Image.new("RGB", (0, 0)), "size": None}, "image: .* one of none"),
        ({"image": Image.new("RGB", (8, 8)), "mask": Image.new("L", (0, 9))}, "mask: .*of none"),
        ({"size": {16, 32}}, "size: expected pixels, one or .*, found {32, 16}|{16, 32}"),
        ({"size": 10**30}, "size: expected at most 65,536 pixels, found 1000"),
        ({"size": 10**5000}, "size: expected at most 65,536 pixels, found a long int"),
        ({"guidance": 10**5000}, "guidance: expected a number -1000…1000, found a long int"),
        ({"guidance": 1e30}, "guidance: expected a number -1000…1000, found 1e.30"),
        ({"steps": 10**5000}, "steps: expected 1…1000, found a long int"),
        ({"size": 16.0}, "size: expected pixels, one or .*, found 16.0"),
        ({"steps": 2.5}, "steps: expected"),
        ({"guidance": "7"}, "guidance: expected a number -1000…1000, found '7'"),
        ({"image": Image.new("L", (8, 8)), "mask": Image.new("L", (8, 8))}, "mask: expected white"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0}, "strength: expected 0.334…1"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0.3}, "strength: expected 0.334…1"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 1.01}, "strength: expected 0.334…1"),
        ({"rescale": 1.5}, "rescale: expected a number 0…1, found 1.5"),
        ({"variation": -0.1}, "variation: expected a number 0…1, found -0.1"),
        ({"variation": float("nan")}, "variation: expected a number 0…1, found nan"),
        ({"variation_seed": -1}, "variation_seed: expected an integer ≥ 0"),
        ({"tile": 8}, "tile: expected 0, for none, or 16 pixels or more, found 8"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly(pipe, options, says):
    with pytest.raises(ValueError, match=says) as caught:
        pipe(PROMPTS[0], **({"size": 16} | options))
    assert "\n" not in str(caught.value)
