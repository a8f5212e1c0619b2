"""`tinyldm sample` with more than a prompt: init images, films, tiles, other autoencoders."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_model import PROMPTS, make_pipeline

from tinyldm.cli.sample import Film
from tinyldm.sampling.metadata import fingerprint
from tinyldm.sampling.pipeline import Pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generating") / "run"
    make_pipeline().save(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    """An image that is not square, a mask of its size, and names for results."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    Image.fromarray(pixels).resize((50, 30)).save(tmp_path / "image.png")
    mask = Image.new("L", (50, 30))
    mask.paste(255, (10, 5, 35, 25))
    mask.save(tmp_path / "mask.png")
    return tmp_path


def same_call(pipe, **options):
    (image,) = pipe(PROMPTS[0], **options)
    return np.asarray(image)


def opened(file):
    return np.asarray(Image.open(file).convert("RGB"))


def test_every_option_is_that_of_the_pipeline(call, run, files):
    image, mask = Image.open(files / "image.png"), Image.open(files / "mask.png")
    pipe = Pipeline.load(run)
    for arguments, options in (
        (["--image", files / "image.png"], {"image": image}),
        (["--image", files / "image.png", "--strength", 0.4], {"image": image, "strength": 0.4}),
        (["--image", files / "image.png", "--mask", files / "mask.png"],
         {"image": image, "mask": mask}),
        (["--image", files / "image.png", "--size", "16x24"], {"image": image, "size": (16, 24)}),
        (["--rescale", 0.7], {"rescale": 0.7}),
        (["--variation", 0.3], {"variation": 0.3}),
        (["--variation", 0.3, "--variation-seed", 8], {"variation": 0.3, "variation_seed": 8}),
        (["--size", 48, "--tile", 16], {"size": 48, "tile": 16}),
    ):  # fmt: skip
        result = call("sample", run, PROMPTS[0], "-o", files / "a.png", *arguments)
        assert (result.code, result.out) == (0, f"{files / 'a.png'}\n"), result.err
        np.testing.assert_array_equal(opened(files / "a.png"), same_call(pipe, **options))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_clear_in_a_mask_stays(call, run, files, mode):
    """It is black in a mask, though white in an image."""
    corner = np.s_[5:25, 10:35]
    levels = np.full((30, 50, 4), (255, 255, 255, 0), np.uint8)
    levels[corner] = 255
    if mode == "P":
        mask = Image.fromarray(levels[..., 3] // 255)
        mask.putpalette([255] * 6)
        mask.save(files / "clear.png", transparency=bytes([0, 255]))
    else:
        Image.fromarray(levels).convert(mode).save(files / "clear.png")
    found = {}
    for name in ("mask", "clear"):
        options = ["--image", files / "image.png", "--mask", files / f"{name}.png"]
        assert call("sample", run, PROMPTS[0], "-o", files / "a.png", *options).code == 0
        found[name] = opened(files / "a.png")
    np.testing.assert_array_equal(found["clear"], found["mask"])
    call("sample", run, PROMPTS[0], "-o", files / "a.png", "--image", files / "clear.png")
    expected = same_call(Pipeline.load(run), image=Image.new("RGB", (50, 30), "white"))
    np.testing.assert_array_equal(opened(files / "a.png"), expected)


def test_a_photograph_is_turned_as_it_says(call, run, files):
    image = Image.open(files / "image.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(files / "turned.png", exif=exif)
    call("sample", run, PROMPTS[0], "-o", files / "a.png", "--image", files / "turned.png")
    upright = image.transpose(Image.Transpose.ROTATE_270)
    expected = same_call(Pipeline.load(run), image=upright)
    assert expected.shape[0] > expected.shape[1]
    np.testing.assert_array_equal(opened(files / "a.png"), expected)


def test_another_autoencoder(call, run, files):
    pipe = Pipeline.load(run)
    for w in pipe.params["vae"].values():
        w *= 1.1
    pipe.save(files / "other")
    weights = files / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    (files / "other" / "vae" / "mine.safetensors").write_bytes(weights.read_bytes())
    weights.write_bytes(b"rubbish")  # which is not named, and so not read
    by_file = files / "other" / "vae" / "mine.safetensors"
    result = call("sample", run, PROMPTS[0], "-o", files / "a.png", "--vae", by_file)
    assert result.code == 0
    np.testing.assert_array_equal(opened(files / "a.png"), same_call(pipe))
    result = call("sample", run, PROMPTS[0], "-o", files / "b.png", "--vae", weights)
    assert result.code == 2 and str(weights) in result.err and not (files / "b.png").exists()
    by_file.rename(weights)
    for place in (files / "other", files / "other" / "vae"):
        result = call("sample", run, PROMPTS[0], "-o", files / "a.png", "--vae", place)
        assert result.code == 0
        np.testing.assert_array_equal(opened(files / "a.png"), same_call(pipe))


# -------------------------------------------------------------------------------------------- films


def test_a_strip_has_a_row_for_each_image(call, run, files):
    result = call(
        "sample", run, PROMPTS[0], "-o", files / "a.png", "--n", 2, "--steps", 7,
        "--film", files / "film.png", "--every", 3,
    )  # fmt: skip
    assert result.out.split() == [str(files / n) for n in ("a-0.png", "a-1.png", "film.png")]
    pipe = Pipeline.load(run)
    path = [x0 for _, x0 in pipe.denoise(pipe.sampling_params([PROMPTS[0]] * 2, steps=7))]
    shown = [pipe.decode(path[i]) for i in (2, 5, 6)]  # the last one is there in any case
    film = opened(files / "film.png")
    assert film.shape[1] > film.shape[0]
    width, height = 96 + 4, 96 + 4  # small images are enlarged six times
    for column, images in enumerate(shown):
        for row, image in enumerate(images):
            place = film[4 + row * height :, 4 + column * width :][:96:6, :96:6]
            np.testing.assert_array_equal(place, image)


@pytest.mark.parametrize("kind", ["webp", "gif"])
@pytest.mark.parametrize("n", [1, 3])
def test_an_animation(call, run, files, kind, n):
    call(
        "sample", run, PROMPTS[0], "-o", files / "a.png", "--n", n, "--steps", 8,
        "--film", files / f"film.{kind}", "--every", 2,
    )  # fmt: skip
    with Image.open(files / f"film.{kind}") as film:
        assert film.n_frames == 4 and film.is_animated
        assert film.size == ((16, 16) if n == 1 else (4 + 2 * 100, 4 + 2 * 100))


@pytest.mark.parametrize(
    "every, steps, shown", [(None, 50, 10), (None, 7, 7), (None, 25, 12), (1, 9, 9), (4, 9, 2)]
)
def test_which_steps_a_film_shows(tmp_path, every, steps, shown):
    film = Film(tmp_path / "film.png", every)
    assert sum(film.shows(i, steps) for i in range(1, steps + 1)) == shown


def test_the_images_of_a_strip_are_not_huge(tmp_path):
    film = Film(tmp_path / "film.png", None)
    for _ in range(3):
        film.add(np.zeros((1, 512, 1024, 3), np.uint8))
    film.save(1)
    with Image.open(tmp_path / "film.png") as strip:
        assert strip.size == (4 + 3 * 260, 4 + 132)


# ----------------------------------------------------------------------------------- the same again

MANY = ["--strength", 0.9, "--rescale", 0.25, "--variation", 0.2, "--variation-seed", 5, "--tile",
        16, "--size", "24x32", "--n", 2]  # fmt: skip


def test_an_image_says_what_it_began_with(call, run, files):
    given = ["--image", files / "image.png", "--mask", files / "mask.png", "--vae", run]
    call("sample", run, PROMPTS[0], "-o", files / "a.png", *given, *MANY)
    with Image.open(files / "a-1.png") as image:
        notes = image.text
    assert {name: notes[name] for name in notes.keys() - {"image", "mask", "software"}} == {
        "prompt": PROMPTS[0],
        "negative_prompt": "",
        "seed": "0",
        "picture": "2 of 2",
        "sampler": "ddim",
        "steps": "3",
        "guidance": "2.0",
        "size": "24x32",
        "strength": "0.9",
        "rescale": "0.25",
        "variation": "0.2",
        "variation_seed": "5",
        "tile": "16",
        "vae": str(run),
        "weights": fingerprint(Pipeline.load(run)),
        "run": str(run),
    }
    for name in ("image", "mask"):
        digest, _, file = notes[name].partition(" ")
        assert len(digest) == 16 and file == str(files / f"{name}.png")


def test_it_is_generated_again_with_all_of_that(call, run, files, monkeypatch):
    monkeypatch.chdir(run.parent)
    given = ["--image", files / "image.png", "--mask", files / "mask.png", "--vae", run]
    call("sample", run, PROMPTS[0], "-o", files / "a.png", *given, *MANY)
    for name in ("a-0", "a-1"):
        result = call("sample", "--reproduce", files / f"{name}.png")
        assert (result.code, result.err) == (0, "")
        again = files / f"{name}-reproduced.png"
        assert again.read_bytes() == (files / f"{name}.png").read_bytes()


@pytest.mark.parametrize("name", ["image.png", "mask.png"])
def test_not_where_what_it_began_with_has_changed(call, run, files, name):
    given = ["--image", files / "image.png", "--mask", files / "mask.png"]
    call("sample", run, PROMPTS[0], "-o", files / "a.png", *given)
    Image.new("RGB", (9, 9), "white").save(files / name)
    result = call("sample", "--reproduce", files / "a.png")
    assert (result.code, result.out) == (2, "")
    assert f"{name}: the input image was" in result.err
    (files / name).unlink()
    assert call("sample", "--reproduce", files / "a.png").code == 2


@pytest.mark.parametrize("note", ["run", "vae", "image", "mask"])
def test_a_note_leads_to_no_file_elsewhere_unless_the_user_names_it(
    call, run, files, note, tmp_path_factory, monkeypatch
):
    """The image may come from a stranger, with `/dev/zero` in its notes."""
    monkeypatch.chdir(run.parent)
    given = {"image": files / "image.png", "mask": files / "mask.png", "vae": run}
    options = [str(word) for name, file in given.items() for word in (f"--{name}", file)]
    call("sample", run, PROMPTS[0], "-o", files / "a.png", *options)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    if note in ("run", "vae"):
        shutil.copytree(run, elsewhere / "run")
        moved = str(elsewhere / "run")
    else:
        moved = str(shutil.copy(given[note], elsewhere))
    with Image.open(files / "a.png") as image:
        notes = PngInfo()
        for key, text in image.text.items():
            was = str(run if note == "run" else given[note])
            notes.add_itxt(key, text.replace(was, moved) if key == note else text)
        image.save(files / "b.png", pnginfo=notes)
    again = ["sample", "--reproduce", files / "b.png", "-o", files / "c.png"]
    result = call(*again)
    assert result.code == 2 and f"b.png: its note names {moved}, which lies neither" in result.err
    assert not (files / "c.png").exists()
    naming = [moved] if note == "run" else [f"--{note}", moved]
    assert call(again[0], *naming, *again[1:]).code == 0
    assert opened(files / "c.png").tolist() == opened(files / "a.png").tolist()


@pytest.mark.parametrize("what", ["pipe", "folder", "/dev/zero"])
def test_an_input_image_that_never_ends_is_not_read(call, run, files, what, monkeypatch):
    monkeypatch.chdir(files)
    os.mkfifo("pipe")
    os.mkdir("folder")
    call("sample", run, PROMPTS[0], "-o", "a.png", "--image", files / "image.png")
    result = call("sample", run, "--reproduce", "a.png", "--image", what)
    assert result.code == 2 and f"{what}: expected an image, found a" in result.err


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--mask {files}/mask.png", "--mask: expected --image FILE with it"),
        ("--strength 0.5", "--strength: expected --image FILE with it"),
        ("--image {files}/nothing.png", "No such file.*nothing.png"),
        ("--image {files}/text.png", "text.png: not an image in a format that is read"),
        ("--image {files}/image.png --mask {files}/text.png", "text.png: not an image"),
        ("--image {files}/image.png --mask {files}/black.png", "mask: expected white"),
        ("--image {files}/image.png --strength 0", "--strength: expected a number 0.001…1"),
        ("--image {files}/image.png --strength 0.2", "strength: expected 0.334…1"),
        ("--every 3", "--every: expected --film with it"),
        ("--variation-seed 3", "--variation-seed: expected --variation with it"),
        ("--rescale 2", "--rescale: expected a number 0…1, found '2'"),
        ("--variation 1.5", "--variation: expected a number 0…1"),
        ("--tile 3", "tile: expected 0, for none, or 16 pixels or more, found 3"),
        ("--film {files}/film.txt", "film.txt: expected the name of an image, such as film.png"),
        ("--every 0 --film {files}/film.png", "--every: expected an integer ≥ 1"),
        ("--vae {files}/nothing", "nothing: no such file or folder"),
        ("--vae {files}/text.png", "text.png: not a safetensors file"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(call, run, files, arguments, says):
    (files / "text.png").write_text("not an image")
    Image.new("L", (50, 30)).save(files / "black.png")
    before = sorted(files.iterdir())
    arguments = arguments.format(files=files).split()
    result = call("sample", run, PROMPTS[0], "-o", files / "a.png", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("tinyldm: ") and len(result.err.splitlines()) == 1
    assert re.search(says, result.err), result.err
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("option", ["strength", "tile", "rescale", "variation"])
def test_with_again_nothing_is_left_to_choose(call, run, files, option):
    call("sample", run, PROMPTS[0], "-o", files / "a.png")
    result = call("sample", "--reproduce", files / "a.png", f"--{option}", "1")
    assert result.code == 2 and f"leave out the {option}" in result.err
    for name in ("image", "mask", "vae"):
        result = call("sample", "--reproduce", files / "a.png", f"--{name}", files / "image.png")
        assert result.code == 2 and f"--{name}: the image was generated without one" in result.err


def test_what_it_began_with_may_have_moved(call, run, files, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    given = ["--image", files / "image.png", "--mask", files / "mask.png", "--vae", run]
    call("sample", run, PROMPTS[0], "-o", files / "a.png", *given)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("image.png", "mask.png"):
        (files / name).rename(moved / name)
    assert call("sample", "--reproduce", files / "a.png").code == 2
    places = ["--image", moved / "image.png", "--mask", moved / "mask.png", "--vae", run / "vae"]
    assert call("sample", "--reproduce", files / "a.png", *places).code == 0
    np.testing.assert_array_equal(opened(files / "a-reproduced.png"), opened(files / "a.png"))
    assert (
        call("sample", "--reproduce", files / "a-reproduced.png", "-o", files / "b.png").code == 0
    )
    places[1] = moved / "mask.png"
    result = call("sample", "--reproduce", files / "a.png", *places)
    assert result.code == 2 and "the input image was" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        "-o {files}/image.png --image {files}/image.png",
        "-o {files}/../{name}/image.png --image {files}/image.png",
        "-o {files}/mask.png --image {files}/image.png --mask {files}/mask.png",
        "-o {files}/a.png --film {files}/a.png",
        "-o {files}/a.png --n 2 --film {files}/a-1.png",
        "-o {files}/a.png --image {files}/image.png --film {files}/image.png",
    ],
)
def test_nothing_replaces_what_is_needed(call, run, files, arguments):
    before = {file: file.read_bytes() for file in files.iterdir()}
    arguments = arguments.format(files=files, name=files.name).split()
    result = call("sample", run, PROMPTS[0], *arguments)
    assert (result.code, result.out) == (2, "")
    assert "would replace an image that is needed; take another name" in result.err
    assert {file: file.read_bytes() for file in files.iterdir()} == before


@pytest.mark.parametrize(
    "output, says", [("a.xbm", "does not hold colours"), ("image.png/a.png", "cannot be written")]
)
def test_an_output_that_cannot_be_is_told_before_the_work(
    call, run, files, output, says, monkeypatch
):
    def working(*args):
        raise AssertionError("it has begun")

    monkeypatch.setattr(Pipeline, "denoise", working)
    for option in ("-o", "--film"):
        result = call("sample", run, PROMPTS[0], option, files / output)
        assert result.code == 2 and says in result.err
    result = call("sample", run, PROMPTS[0], "-o", files / "a.png", "--tile", 8)
    assert result.code == 2 and "tile: expected" in result.err


def test_a_prompt_that_is_no_text(call, run, files):
    for arguments in (["\udcff"], ["a", "--negative", "\udcff"]):
        result = call("sample", run, *arguments, "-o", files / "a.png")
        assert result.code == 2 and "not valid UTF-8" in result.err


def test_a_checkpoint_that_is_not_there(call, run, files):
    for name in ("nope", "nope.safetensors", "nope.ckpt"):
        result = call("sample", files / name, "a cat", "-o", files / "a.png")
        assert result.code == 2 and f"{name}: no such file or folder" in result.err


def test_other_kinds_of_pipelines_are_named(call, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "xl")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    result = call("sample", folder, PROMPTS[0], "-o", tmp_path / "a.png")
    assert result.code == 2
    assert "a StableDiffusionXLPipeline is not implemented, only Stable Diffusion 1" in result.err


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.ckpt"])
def test_a_folder_of_pickles(call, run, tmp_path, name):
    folder = shutil.copytree(run, tmp_path / "pickled")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / name).write_bytes(b"\x80\x02}q\x00.")
    result = call("sample", folder, PROMPTS[0], "-o", tmp_path / "a.png")
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert f"{name}: a pickle of torch" in result.err
