"""The pages: their commands run, their code runs, their links lead somewhere, they stay short."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from original_layout import narrow, random_model, to_original
from PIL import Image
from slow import mostly_slow
from small_run import CONFIG, without_images

from tests import course
from tinyldm import cli
from tinyldm.checkpoints import single_file as original
from tinyldm.checkpoints.safetensors import save_weights
from tinyldm.models import Tokenizer
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training import presets

ROOT = Path(__file__).parents[1]
PAGES = [file for file in ROOT.rglob("*.md") if ".venv" not in file.parts]
COMMAND_PAGE = (ROOT / "tinyldm" / "cli" / "README.md").read_text(encoding="utf-8")
LONGEST_README = 12_000  # bytes: what a visitor reads in five minutes


def commands_of(section):
    block = re.search(rf"<!-- {section} -->\n```sh\n(.*?)```", COMMAND_PAGE, re.DOTALL)[1]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


COMMANDS = commands_of("stable diffusion")
CHECKPOINTS = {  # version, channels of the U-Net
    "stable-diffusion-v1-5": (1, 4),
    "v1-5-pruned-emaonly.safetensors": (1, 4),
    "stable-diffusion-inpainting": (1, 9),
    "stable-diffusion-2-1": (2, 4),
}
FEWER_STEPS = ["--steps", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the commands name, the checkpoints narrow."""
    folder = tmp_path_factory.mktemp("readme")
    for name, (version, channels) in CHECKPOINTS.items():
        configs, pad, params = random_model(version, channels)
        if name.endswith(".safetensors"):
            save_weights(folder / name, to_original(params, version))
        else:
            if version == 2:
                configs["scheduler"]["prediction_type"] = "v_prediction"
            pipe = Pipeline(configs, params, Tokenizer.clip(pad))
            pipe.save(folder / name)
    shutil.copytree(folder / "stable-diffusion-2-1" / "vae", folder / "sd-vae-ft-mse")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((240, 180)).save(folder / "photo.png")
    mask = np.zeros((180, 240), np.uint8)
    mask[50:120, 80:200] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


CODE = [
    (page, code)
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if "from tinyldm.testing import" in code
]


@pytest.mark.parametrize("page, code", CODE, ids=[str(p.relative_to(ROOT)) for p, _ in CODE])
def test_code_that_checks_gradients_runs(page, code):
    names = {"__name__": "page"}
    exec(code, names)
    for name, value in list(names.items()):
        if name.startswith("test_"):
            value()


QUESTIONS = re.findall(
    r"^## (\d+)\. (.*?)\n.*?```python\n(.*?)```\n\n```\n(.*?)```",
    (ROOT / "tinyldm" / "questions.md").read_text(encoding="utf-8"),
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.parametrize("number, title, code, says", QUESTIONS, ids=[q[1] for q in QUESTIONS])
def test_an_answer_prints_what_stands_below_it(number, title, code, says, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(code, {"__name__": "answer"})
    assert capsys.readouterr().out == says


def test_there_are_twenty_questions():
    text = (ROOT / "tinyldm" / "questions.md").read_text(encoding="utf-8")
    assert len(QUESTIONS) == text.count("\n## ") >= 20


def test_the_course_has_the_code_of_the_source_and_what_it_prints():
    """`python -m tests.course` renews both."""
    page = course.COURSE.read_text(encoding="utf-8")
    assert course.filled(page) == page
    assert course.run(page) == page


def test_every_stop_has_all_that_a_stop_has():
    page = course.COURSE.read_text(encoding="utf-8")
    stops = re.findall(r"^## \d+\. .*?(?=^## )", page, re.DOTALL | re.MULTILINE)
    assert len(stops) == 10
    for stop in stops:
        title, _, question = stop.splitlines()[:3]
        assert re.fullmatch(r"\*.+\?\*", question), title
        assert len(course.BLOCK.findall(stop)) >= 1 and len(course.RUN.findall(stop)) == 1, title
        assert stop.index("**Predict:**") < stop.index("```"), title  # before the answer is seen
        assert "`tinyldm exercise " in stop or title.startswith("## 5."), title


IMAGES = ROOT / "data" / "images"
make_images = runpy.run_path(str(ROOT / "data" / "make_images.py"))


def test_every_image_of_the_pages_is_listed_and_is_the_one_that_was_made():
    """`data/make_images.py` renews the checksums; the list says what each image shows."""
    found = make_images["sums"]()
    assert found == json.loads((IMAGES / "manifest.json").read_text(encoding="utf-8"))
    listed = re.findall(r"^\| `([\w.-]+)` \|", (IMAGES / "README.md").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(found)
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"images/([\w.-]+)\)", pages)) == found.keys()


def test_the_diagram_is_that_of_the_demo():
    drawn = (IMAGES / "diagram.svg").read_text(encoding="utf-8")
    assert drawn == make_images["diagram_of_the_demo"]()


def test_the_section_shows_every_option():
    words = {word for command in COMMANDS for word in command if word.startswith("--")}
    assert words >= {
        "--sampler", "--steps", "--negative", "--seed", "--size", "--n", "--image", "--strength",
        "--mask", "--variation", "--guidance", "--rescale", "--film", "--every", "--vae", "--tile",
    }  # fmt: skip
    assert {command[2] for command in COMMANDS} == CHECKPOINTS.keys()


@pytest.mark.parametrize(
    "command", mostly_slow(COMMANDS, COMMANDS[0]), ids=lambda command: command[-1]
)
def test_a_command(place, monkeypatch, capfd, command):
    monkeypatch.chdir(place)
    configs, pad = narrow(1)
    monkeypatch.setattr(original, "VERSIONS", {64: (configs, pad)})
    monkeypatch.setattr(original, "LARGE_SIDE", 8)
    monkeypatch.setattr("tinyldm.sampling.pipeline.DEFAULTS", {"steps": 5, "guidance": 7.5})
    program, *arguments = command
    assert program == ".venv/bin/tinyldm"
    if "--size" in command:  # 64 pixels are to this model what 512 are to the real one
        at = arguments.index("--size") + 1
        height, width = map(int, arguments[at].split("x"))
        arguments[at] = f"{height // 8}x{width // 8}"
    if "--tile" in arguments:
        arguments[arguments.index("--tile") + 1] = "64"
        arguments += ["--size", "96"]
    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    names = out.split()
    count = int(arguments[arguments.index("--n") + 1]) if "--n" in arguments else 1
    assert len(names) == count + ("--film" in arguments)
    for name in names:
        with Image.open(name) as image:
            assert np.asarray(image.convert("RGB")).std() > 5
            if "--film" in arguments and name == names[-1]:
                assert image.n_frames == 10
            elif "--tile" in arguments:
                assert image.size == (96, 96)
            elif "--size" in command:
                assert image.size == (width // 8, height // 8)
            elif "--image" in arguments:  # 4 : 3, in multiples of 64
                assert image.size == (64, 64)


@pytest.mark.slow
def test_the_commands_of_the_tasks(tmp_path, monkeypatch, call):
    """One after the other, with a model that is small and has hardly learnt."""
    without_images(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "data" / "examples", tmp_path / "data" / "examples")
    monkeypatch.setitem(presets.PRESETS, "demo", CONFIG)
    sizes = {"large.png": (32, 32)}
    for program, *arguments in commands_of("tasks"):
        assert program == ".venv/bin/tinyldm"
        if "--minutes" in arguments:
            arguments[arguments.index("--minutes") + 1] = "0.01"
        result = call(*arguments)
        assert result.code == 0, result.err
        names = result.out.split()
        if arguments[0] == "sample":
            assert len(names) == (4 if "--n" in arguments else 1)
            for name in names:
                with Image.open(name) as image:
                    assert image.size == sizes.get(name, (16, 16))
