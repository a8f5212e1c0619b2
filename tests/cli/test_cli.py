"""The command line: exit codes, one line for every mistake, and stdout for results alone."""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from slow import mostly_slow

import tinyldm
from tinyldm import backend, cli
from tinyldm.cli import demo, evaluate
from tinyldm.cli import evaluate as commands
from tinyldm.cli import sample as generating
from tinyldm.diffusion import SAMPLERS
from tinyldm.diffusion.loss import WEIGHTINGS
from tinyldm.diffusion.schedule import PREDICTIONS
from tinyldm.evaluation.metrics import SEED
from tinyldm.nn.optim import DECAYS
from tinyldm.sampling.metadata import fingerprint
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.sampling.tasks import TASKS
from tinyldm.training import classifier, config, loop, presets
from tinyldm.training import run as runs
from tinyldm.training.config import Stage
from tinyldm.training.state import load_state, state_files

STEPS = 3  # of each stage
STAGE = Stage(batch=4, rate=1e-3, warmup=2, ema=0.9, steps=STEPS)
SMALL = dataclasses.replace(
    presets.PRESETS["tiny"],
    images=32,
    held_out=0.6,
    autoencoder=STAGE,
    denoiser=STAGE,
    vae_widths=(4, 8),
    unet_widths=(8,),
    unet_attention=(True,),
    groups=4,
    heads=2,
    text_width=8,
    steps=2,
)
PROMPT = "a large red circle on blue at the left"
TRAIN = ["train", "--preset", "tiny", "--out"]


@pytest.fixture
def small(monkeypatch):
    for name in presets.PRESETS:
        monkeypatch.setitem(presets.PRESETS, name, SMALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", SMALL)
        assert cli.main([*TRAIN, str(folder)]) == 0
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def assert_mistake(result, *parts, lines=1, begins="tinyldm: "):
    """Exit code 2, nothing on stdout, and one line on stderr that names the parts."""
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    assert result.err.endswith("\n") and len(result.err.splitlines()) == lines
    last = result.err.splitlines()[-1]
    assert last.startswith(begins)
    for part in map(str, parts):
        assert part in last


def assert_usage(result, *parts):
    """The same for what the parser notices, which also says where to read on."""
    assert_mistake(result, *parts, "; see tinyldm", " --help")


# ------------------------------------------------------------------------------- help and mistakes


@pytest.mark.parametrize("command", [None, "demo", "train", "sample", "eval", "doctor"])
def test_help(call, command):
    result = call(*([command] if command else []), "--help")
    assert result.code == 0 and result.err == ""
    assert result.out.startswith(f"usage: tinyldm {command or ''}")
    assert all(len(line) <= 120 for line in result.out.splitlines())
    names = ["--device", "--seed"] if command in ("demo", "train", "sample") else []
    if command is None:
        names = [*cli.COMMANDS, "--version"]
    assert all(name in result.out for name in names)


def test_version(call):
    result = call("--version")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"tinyldm {tinyldm.__version__}\n"


def test_version_of_the_module_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "tinyldm", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"tinyldm {tinyldm.__version__}\n"


def test_help_does_not_wait_for_numpy():
    script = """
import sys
from tinyldm.cli import main
try:
    main(["--help"])
except SystemExit:
    heavy = {"numpy", "PIL", "scipy", "tqdm"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_help_names_every_choice_and_default(call):
    told = " ".join(call("train", "--help").out.split())
    first = (config.FIRST_STAGES, TASKS, config.CONDITIONS, config.SCHEDULES, WEIGHTINGS, DECAYS)
    defaults = {next(iter(words)): words for words in first} | {"v_prediction": PREDICTIONS}
    for default, words in defaults.items():
        assert f"{', '.join(words)} (default: {default})" in told
    assert ", ".join(SAMPLERS) in " ".join(call("sample", "--help").out.split())


def test_what_is_learnt_can_be_chosen(call, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "estimate_run", lambda *args: 1 / 0)  # before the work
    seen = []
    monkeypatch.setattr(runs, "fit_tokenizer", lambda c, *rest: seen.append(c) or (None, c))
    chosen = {"prediction": "epsilon", "schedule": "cosine", "weighting": "min-snr",
              "noise-offset": 0.1, "decay": "linear", "condition": "none"}  # fmt: skip
    options = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    with pytest.raises(ZeroDivisionError):
        call("train", "--preset", "tiny", "--out", tmp_path / "run", *options)
    for name, value in chosen.items():
        if name == "decay":
            assert seen[0].autoencoder.decay == seen[0].denoiser.decay == value
        else:
            assert getattr(seen[0], name.replace("-", "_")) == value
    refused = call("train", "--preset", "tiny", "--out", tmp_path / "run",
                   "--schedule", "zero_snr", "--prediction", "epsilon")  # fmt: skip
    assert (
        refused.code == 2 and refused.err.count("\n") == 2 and "ε does not lead back" in refused.err
    )


def test_the_help_names_every_preset(call):
    told = " ".join(call("train", "--help").out.split())
    for name, preset in presets.PRESETS.items():
        assert f"{name} ({preset.side} px, " in told


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND"]),
        (
            ["generate"],
            ["eval, experiment, explain, exercise or doctor, found 'generate'"],
        ),
        (["smaple", "run", "p"], ["found 'smaple'; did you mean 'sample'?"]),
        (["sample"], ["expected RUN and PROMPT"]),
        (["sample", "run"], ["expected RUN and PROMPT"]),
        (["train"], ["--out"]),
        (
            ["train", "--out", "x", "--sede", "3"],
            ["unknown option '--sede'; did you mean '--seed'?"],
        ),
        (["train", "--out", "x", "--pre", "demo"], ["'--pre'; did you mean '--preset'?"]),
        (["train", "--out", "x", "--preset", "huge"], ["--preset", "large, found 'huge'"]),
        (["train", "--out", "x", "--preset", "dmeo"], ["'dmeo'; did you mean 'demo'?"]),
        (["train", "--out", "x", "--device", "tpu"], ["--device: expected cpu or cuda", "tpu"]),
        (["train", "--out", "x", "--resume", "--overwrite"], ["--overwrite", "--resume"]),
        (["train", "--out", "x", "--minutes", "0"], ["--minutes: expected a number 0.01…1"]),
        (["train", "--out", "x", "--keep", "0"], ["--keep: expected an integer 1…1000"]),
        (["sample", "run", "a", "large", "circle"], ["unexpected 'large'; a PROMPT", "quotes"]),
        (["sample", "run", "p", "-o"], ["-o"]),
        (["sample", "run", "p", "--n", "1" + 30 * "0"], ["--n", "1…4096, found '1000"]),
        (
            ["sample", "--reproduce", "a.png", "--steps", "3"],
            ["--reproduce takes everything", "steps"],
        ),
        (["--colour"], ["COMMAND"]),
        (["--colour", "demo"], ["'--colour'"]),
    ],
)
def test_wrong_commands_and_options(call, arguments, parts):
    assert_usage(call(*arguments), *parts)


SAMPLE = ["sample", "no-such-run", PROMPT]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "ten", "nan", "", "1e3"])
@pytest.mark.parametrize("option", ["--steps", "--n"])
def test_integers(call, option, text):
    found = f"found {text!r}"
    assert_usage(call(*SAMPLE, f"{option}={text}"), option, "expected an integer", "1", found)


@pytest.mark.parametrize(
    ("arguments", "option", "least"),
    [
        (SAMPLE, "--seed", 0),
        (["demo"], "--seed", 0),
        ([*TRAIN, "x"], "--seed", 0),
        (["eval", "no-such-run"], "--captions", 4),
        (["eval", "no-such-run"], "--steps", 1),
    ],
)
def test_the_least_of_integers(call, arguments, option, least):
    for text in (str(least - 1), "-1", "1.5", "ten", "nan"):
        assert_usage(call(*arguments, option, text), option, str(least), f", found {text!r}")


@pytest.mark.parametrize("text", ["1.5", "ten", "nan", "", "x", "x16", "16x", "16x16x16"])
def test_sizes_that_are_none(call, text):
    assert_usage(call(*SAMPLE, f"--size={text}"), "--size", f"found {text!r}")


@pytest.mark.parametrize("text", ["ten", "", "nan", "inf", "-inf"])
@pytest.mark.parametrize("command", [SAMPLE, ["eval", "no-such-run"]], ids=["sample", "eval"])
def test_guidance_is_a_number(call, command, text):
    assert_usage(call(*command, f"--guidance={text}"), "--guidance", repr(text))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--size", "15"], ["size: expected multiples of 2, found 15×15; the nearest is 16×16"]),
        (["--size", "16x9"], ["size: expected", "multiples of 2", "16", "9"]),
        (["--size", "0"], ["size: expected", "found", "0"]),
        (["--size", "-2"], ["size: expected", "found", "-2"]),
        (["--steps", "1001"], ["steps", "1…1000", "1001"]),
        (["--sampler", "dimm"], ["sampler", "ddim", "'dimm'"]),
    ],
)
def test_numbers_that_do_not_fit_the_model(call, run, tmp_path, options, parts):
    output = tmp_path / "a.png"
    assert_mistake(call("sample", run, PROMPT, "-o", output, *options), *parts)
    assert not output.exists()


# ------------------------------------------------------------------------------------------- train


def test_train(call, small, tmp_path):
    result = call(*TRAIN, tmp_path / "new" / "run", "--seed", 3)
    assert result.code == 0
    assert result.out == f"{tmp_path / 'new' / 'run'}\n"
    assert "stage 1 of 2" in result.err and "stage 2 of 2" in result.err
    assert result.err.startswith(f"tinyldm {tinyldm.__version__}: NumPy ")
    assert (tmp_path / "new" / "run" / "model_index.json").exists()
    config = load_state(tmp_path / "new" / "run").config
    assert config == dataclasses.replace(SMALL, seed=3)


@pytest.mark.slow
def test_train_on_a_folder(call, small, tmp_path):
    for i in range(4):
        file = tmp_path / "data" / ("red" if i % 2 else "green") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), ("red" if i % 2 else "green")).save(file)
    result = call(*TRAIN, tmp_path / "run", "--data", tmp_path / "data")
    assert result.code == 0
    assert load_state(tmp_path / "run").config.data == str(tmp_path / "data")
    result = call("eval", tmp_path / "run", "--captions", 4)
    assert result.code == 0
    assert "first stage, PSNR" in result.out and "training images (none are held" in result.out
    assert call("sample", tmp_path / "run", "red", "-o", tmp_path / "a.png").code == 0


def test_a_run_is_not_written_over_but_resumed(call, copy):
    assert_mistake_after_device(call(*TRAIN, copy), copy, "holds a run already", "--resume")
    result = call(*TRAIN, copy, "--resume")
    assert (result.code, result.out) == (0, f"{copy}\n")


def assert_mistake_after_device(result, *parts):
    """`train` has said by then on which device it is."""
    assert_mistake(result, *parts, lines=2)


def test_what_train_cannot_begin_with(call, tmp_path):
    nowhere, data = tmp_path / "none", tmp_path / "data"
    result = call(*TRAIN, nowhere, "--resume")
    assert_mistake_after_device(result, nowhere, "holds no run")
    result = call(*TRAIN, nowhere, "--data", data)
    assert_mistake_after_device(result, data, "expected a folder of images")
    data.mkdir()
    result = call(*TRAIN, nowhere, "--data", data)
    assert_mistake_after_device(result, data, "no image among its 0 files")
    (data / "a.png").write_bytes(b"")
    result = call(*TRAIN, nowhere, "--data", data)
    assert_mistake(result, f"  {data / 'a.png'}: not an image", lines=3, begins="  ")
    assert f"tinyldm: {data}: 1 problems with 1 images" in result.err
    assert not nowhere.exists()


def test_a_folder_that_cannot_be_made(call, small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_mistake_after_device(call(*TRAIN, tmp_path / "file"), tmp_path / "file")


def test_divergence_is_a_failure_and_not_a_mistake(call, small, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def diverging(loss_fn, state, *rest):
        yield lambda batch: (np.float32(math.nan), dict(state.params))

    monkeypatch.setattr(loop, "stage_gradient", diverging)
    result = call(*TRAIN, tmp_path / "run")
    assert (result.code, result.out) == (1, "")
    last = result.err.splitlines()[-1]
    assert last.startswith("tinyldm: stage autoencoder, step ") and " is nan" in last
    assert "Traceback" not in result.err


def test_a_fault_of_the_library_is_not_hidden(call, run, monkeypatch):
    def fault(*args):
        raise AssertionError("a fault")

    monkeypatch.setattr(Pipeline, "load", fault)
    with pytest.raises(AssertionError, match="a fault"):
        call("sample", run, PROMPT)


def test_without_memory(call, run, monkeypatch):
    def full(*args):
        raise MemoryError("Unable to allocate 3.00 TiB")

    monkeypatch.setattr(Pipeline, "load", full)
    result = call("sample", run, PROMPT)
    assert (result.code, result.out, result.err) == (
        1,
        "",
        "tinyldm: Unable to allocate 3.00 TiB\n",
    )


def test_a_full_disk_is_a_failure_and_not_a_mistake(call, copy, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a.png"))

    monkeypatch.setattr(generating, "save_image", full)
    result = call("sample", copy, PROMPT, "-o", tmp_path / "a.png")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("tinyldm: ") and "a.png'; a file could not be wri" in result.err
    assert len(result.err.splitlines()) == 1


def test_ctrl_c_anywhere_else(call, run, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "load", interrupted)
    result = call("sample", run, PROMPT)
    assert (result.code, result.err) == (130, "tinyldm: interrupted\n")


def test_demo(call, small, tmp_path, monkeypatch):
    asked = []
    evaluate = commands.evaluate
    monkeypatch.setattr(
        commands,
        "evaluate",
        lambda p, seen, unseen, n, *a: asked.append(n) or evaluate(p, seen, unseen, 4, *a),
    )
    result = call("demo", "--out", tmp_path / "run")
    assert result.code == 0 and asked == [200]
    first, *lines = result.out.splitlines()
    assert first == str(tmp_path / "run")
    assert lines[0].startswith("right by rule, in %")
    assert "4 images generated" in lines
    assert (tmp_path / "run" / "eval.json").exists()
    assert f'tinyldm sample {tmp_path / "run"} "' in result.err


def test_demo_takes_minutes_and_goes_on(call, small, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(demo.training, "make_config", lambda **options: asked.append(options))
    monkeypatch.setattr(demo.training, "train", lambda *args, **others: 1 / 0)
    monkeypatch.setattr(demo.training, "resume", lambda *args, **options: asked.append(options))
    monkeypatch.setattr(demo.evaluate, "run", lambda options: None)
    with pytest.raises(ZeroDivisionError):
        call("demo", "--minutes", 10, "--out", tmp_path)
    monkeypatch.setattr(demo.training, "_what_to_say", lambda pipeline: "…")
    assert call("demo", "--resume", "--minutes", 5, "--out", tmp_path).code == 0
    assert [options["minutes"] for options in asked] == [10, 5]


# ------------------------------------------------------------------------------------------ sample


def test_sample_one_image(call, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("sample", run, PROMPT)
    assert (result.code, result.out, result.err) == (0, "sample.png\n", "")
    with Image.open(tmp_path / "sample.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (16, 16))
        (expected,) = Pipeline.load(run)(PROMPT)
        assert image.tobytes() == expected.tobytes()


def test_sample_several_with_every_option(call, run, tmp_path):
    output = tmp_path / "new" / "folder" / "a.b.png"
    result = call(
        "sample", run, PROMPT, "-o", output, "--n", 3, "--steps", 1, "--guidance", 1.5,
        "--sampler", "ddpm", "--seed", 7, "--size", "8x12", "--negative", "a circle",
    )  # fmt: skip
    files = [output.with_name(f"a.b-{i}.png") for i in range(3)]
    assert (result.code, result.err) == (0, "")
    assert result.out == "".join(f"{file}\n" for file in files)
    assert sorted(output.parent.iterdir()) == files
    expected = Pipeline.load(run)(
        [PROMPT] * 3, steps=1, guidance=1.5, sampler="ddpm", seed=7, size=(8, 12),
        negative_prompt="a circle",
    )  # fmt: skip
    for file, image in zip(files, expected, strict=True):
        with Image.open(file) as found:
            assert found.size == (12, 8)
            assert found.tobytes() == image.tobytes()
    assert len({image.tobytes() for image in expected}) == 3


def test_words_that_no_caption_had_are_named(call, copy, tmp_path):
    """All of them; and a state that cannot be read keeps nobody from generating."""
    prompt = "a cyan hexagon"
    result = call("sample", copy, prompt, "-o", tmp_path / "a.png")
    said = "words that no caption had, or one alone: cyan, hexagon\n"
    assert result.code == 0 and said in result.err
    known = call("sample", copy, "a red circle on blue", "-o", tmp_path / "a.png")
    assert known.code == 0 and "no caption had" not in known.err
    state_files(copy)[-1].write_bytes(b"{")
    result = call("sample", copy, prompt, "-o", tmp_path / "a.png")
    assert result.code == 0 and "no caption had" not in result.err


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.gif"])
def test_sample_in_other_formats(call, run, tmp_path, name):
    result = call("sample", run, PROMPT, "-o", tmp_path / name)
    assert (result.code, result.out) == (0, f"{tmp_path / name}\n")
    assert "only a .png stores how it was generated" in result.err
    with Image.open(tmp_path / name) as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize("name", ["a", "a.xyz", "a.npz", ""])
def test_a_format_that_is_none_is_noticed_before_the_work(call, run, tmp_path, monkeypatch, name):
    def too_late(*args):
        raise AssertionError("generated before it looked at the name")

    monkeypatch.setattr(Pipeline, "denoise", too_late)
    assert_mistake(call("sample", run, PROMPT, "-o", tmp_path / name), tmp_path / name)


def test_an_output_that_cannot_be_written(call, run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_mistake(
        call("sample", run, PROMPT, "-o", tmp_path / "file" / "a.png"), tmp_path / "file"
    )


def test_folders_that_are_no_run(call, tmp_path):
    missing = tmp_path / "none"
    assert_mistake(call("sample", missing, PROMPT), missing, "no such file or folder")
    for command in ("eval", "explain"):
        assert_mistake(call(command, missing), missing, "holds no run")
    (tmp_path / "file").write_text("")
    assert_mistake(call("sample", tmp_path / "file", PROMPT), tmp_path / "file")
    assert_mistake(call("sample", tmp_path, PROMPT), tmp_path / "model_index.json", "missing")


@pytest.mark.parametrize(
    "file", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"]
)
@pytest.mark.parametrize("action", ["remove", "damage"])
def test_folders_that_are_spoilt(call, copy, file, action):
    if action == "remove":
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(b"{")
    assert_mistake(call("sample", copy, PROMPT), (copy / file).parent)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_that_are_no_numbers_give_no_image(call, copy, tmp_path):
    pipeline = Pipeline.load(copy)
    pipeline.params["unet"]["conv_in.bias"][:] = math.nan
    pipeline.save(copy)
    result = call("sample", copy, PROMPT, "-o", tmp_path / "a.png")
    assert_mistake(result, "not finite", "diverged")
    assert not (tmp_path / "a.png").exists()


# --------------------------------------------------------------------------------- the same again


OPTIONS = ["--n", 3, "--steps", 2, "--guidance", 1.3, "--sampler", "ddpm", "--seed", 7, "--size",
           "8x12", "--negative", "a circle, déjà vu"]  # fmt: skip


def test_an_image_says_how_it_was_generated(call, run, tmp_path):
    call("sample", run, PROMPT, "-o", tmp_path / "a.png", *OPTIONS)
    with Image.open(tmp_path / "a-1.png") as image:
        assert image.text == {
            "software": f"tinyldm {tinyldm.__version__}",
            "prompt": PROMPT,
            "negative_prompt": "a circle, déjà vu",
            "seed": "7",
            "picture": "2 of 3",
            "sampler": "ddpm",
            "steps": "2",
            "guidance": "1.3",
            "size": "8x12",
            "weights": fingerprint(Pipeline.load(run)),
            "run": str(run),
        }


@pytest.mark.parametrize("options", [[], OPTIONS], ids=["defaults", "all options"])
def test_generated_again_it_has_the_same_bytes(call, run, tmp_path, options, monkeypatch):
    monkeypatch.chdir(run.parent)
    call("sample", run, PROMPT, "-o", tmp_path / "a.png", *options)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == (3 if options else 1)
    for file, content in before.items():
        result = call("sample", "--reproduce", file)
        again = file.with_stem(f"{file.stem}-reproduced")
        assert (result.code, result.out, result.err) == (0, f"{again}\n", "")
        assert again.read_bytes() == content
    assert call("sample", "--reproduce", again, "-o", tmp_path / "b.png").code == 0
    assert (tmp_path / "b.png").read_bytes() == content
    assert all(file.read_bytes() == content for file, content in before.items())


def test_the_model_of_an_image_may_have_moved_but_not_changed(call, copy, tmp_path):
    image, moved = tmp_path / "a.png", tmp_path / "moved"
    call("sample", copy, PROMPT, "-o", image)
    copy.rename(moved)
    assert_mistake(call("sample", "--reproduce", image), copy, "no such file or folder")
    assert call("sample", moved, "--reproduce", image).code == 0
    assert image.with_stem("a-reproduced").read_bytes() == image.read_bytes()
    pipeline = Pipeline.load(moved)
    pipeline.params["text_encoder"]["text_model.final_layer_norm.bias"][0] += 1e-7
    pipeline.save(moved)
    result = call("sample", moved, "--reproduce", image, "-o", tmp_path / "b.png")
    assert_mistake(result, "was generated with weights", "tinyldm sample RUN --reproduce FILE")
    assert not (tmp_path / "b.png").exists()


def test_images_that_say_nothing(call, run, tmp_path):
    file = tmp_path / "a.png"
    assert_mistake(call("sample", "--reproduce", file), file)
    Image.new("RGB", (8, 8)).save(file)
    assert_mistake(call("sample", "--reproduce", file), file, "generated by `tinyldm sample`")
    file.write_bytes(b"")
    assert_mistake(call("sample", "--reproduce", file), file, "expected a PNG")
    call("sample", run, PROMPT, "-o", tmp_path / "b.jpg")
    assert_mistake(call("sample", "--reproduce", tmp_path / "b.jpg"), "expected a PNG")
    call("sample", run, PROMPT, "-o", file)
    with Image.open(file) as image:
        notes = PngInfo()
        for key, text in (image.text | {"steps": "many"}).items():
            notes.add_itxt(key, text)
        image.save(file, pnginfo=notes)
    assert_mistake(call("sample", "--reproduce", file), file, "its notes are not those of tinyldm")


# -------------------------------------------------------------------------------------------- eval


def test_eval(call, copy):
    result = call("eval", copy, "--captions", 6, "--steps", 1, "--guidance", 1)
    assert result.code == 0
    assert result.err.endswith(f"{copy / 'samples' / 'nearest.png'}\n")
    head, *rows = result.out.splitlines()
    assert head.split() == ["right", "by", "rule,", "in", "%", "size", "colour", "shape",
                            "background", "position", "all"]  # fmt: skip
    found = json.loads((copy / "eval.json").read_text())
    assert found["captions"] == 6 and "6 images generated" in rows
    for row, name in zip(rows[:4], ("reader", "reconstructed", "seen", "held_out"), strict=True):
        shares = re.findall(r"([0-9.]+) ± ([0-9.]+)", row)
        both = [found[name].values(), found["error"][name].values()]
        expected = [[f"{100 * number:.1f}" for number in numbers] for numbers in both]
        assert shares == list(zip(*expected, strict=True)) and len(shares) == 6
    assert found["reader"]["all"] == 1
    assert 0 < found["psnr"] < 60 and 0 < found["ssim"] <= 1
    for name in ("training", "held_out"):
        assert len(found["loss_by_noise"][name]) == 5 and min(found["loss_by_noise"][name]) > 0
    for name in ("frechet", "kernel", "nearest"):
        assert {"generated", "held_out"} <= set(found[name])
    assert 0 <= found["nearest"]["copied"] <= 1
    with Image.open(copy / "samples" / "nearest.png") as image:
        assert image.height > 2 * 90
    assert found["error"]["psnr"] > 0 and found["error"]["frechet"]["generated"] is None  # of 3
    again = call("eval", copy, "--captions", 6, "--steps", 1, "--guidance", 1)
    assert again.out == result.out
    other = call("eval", copy, "--captions", 6, "--steps", 1, "--guidance", 1, "--seed", 5)
    assert other.code == 0 and other.out != result.out
    assert json.loads((copy / "eval.json").read_text())["seed"] == SEED + 5


@pytest.mark.slow
def test_eval_with_a_classifier(call, copy, monkeypatch):
    monkeypatch.setattr(classifier, "FEWEST", 1)
    monkeypatch.setattr(evaluate, "TRUSTED", 0)
    command = ["eval", copy, "--captions", 6, "--steps", 1, "--guidance", 1]
    learning = (
        "a classifier is trained to predict from images: size, colour, shape, background, pos"
    )
    result = call(*command, "--classifier-seconds", 0.1)
    assert result.code == 0 and learning in result.err
    found = json.loads((copy / "eval.json").read_text())
    accuracy = found["features"].pop("accuracy")
    assert found["features"] == {"kind": "classifier"} and 0 <= accuracy <= 1
    row = f"features of a classifier                    right on {100 * accuracy:.1f} % of held-out"
    assert row in result.out

    again = call(*command, "--classifier-seconds", 0.1)
    assert (again.code, again.out) == (0, result.out) and learning not in again.err
    latents = call(*command, "--classifier-seconds", 0)
    found = json.loads((copy / "eval.json").read_text())
    assert latents.code == 0 and found["features"] == {"kind": "latents"}
    assert latents.out != result.out and "latents" in latents.out
    monkeypatch.setattr(evaluate, "TRUSTED", accuracy + 0.01)
    seldom = call(*command, "--classifier-seconds", 0.1)
    assert f"right on {accuracy:.1%} of held-out images only" in seldom.err
    assert seldom.out == latents.out
    # a run goes on past that file, too
    assert load_state(copy).finished and call(*TRAIN, copy, "--resume").code == 0


@pytest.mark.slow
def test_eval_of_a_run_of_one_image(call, small, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "data" / "only.png")
    assert call(*TRAIN, tmp_path / "run", "--data", tmp_path / "data").code == 0
    result = call("eval", tmp_path / "run", "--captions", 4)
    assert result.code == 0
    assert "nearest training image" in result.out and "Fréchet" not in result.out


@pytest.mark.filterwarnings("default")
def test_a_prompt_that_is_too_long_gets_a_line(call, run, tmp_path):
    result = call("sample", run, "a red circle " * 20, "-o", tmp_path / "a.png")
    assert result.code == 0
    assert result.err.startswith("tinyldm: caption cut at 14 tokens, without ")
    assert len(result.err.splitlines()) == 1


def test_eval_of_a_model_that_says_nothing_of_its_training(call, copy):
    shutil.rmtree(copy / "training")
    assert_mistake(call("eval", copy), copy, "holds no run")
    assert call("sample", copy, PROMPT, "-o", copy / "a.png").code == 0


# ------------------------------------------------------------------------------- an export cut off


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_a_cut_off_export_is_made_again(call, copy, run, command):
    (copy / "model_index.json").unlink()
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    options = {"sample": [PROMPT, "-o", copy / "a.png"], "eval": ["--captions", 4]}[command]
    result = call(command, copy, *options)
    assert result.code == 0
    said = f"{copy}: the export is incomplete; exporting again from the state"
    assert result.err.splitlines()[0] == said
    for file in ("model_index.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (copy / file).read_bytes() == (run / file).read_bytes()


def test_a_cut_off_export_of_a_damaged_state(call, copy):
    (copy / "model_index.json").unlink()
    file = max((copy / "training").glob("state-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert_mistake(call("sample", copy, PROMPT), file)


# ------------------------------------------------------------------------------------------ device


def test_cuda_without_cupy(call, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    backend._cupy.cache_clear()
    says = ['device "cuda": CuPy is not installed', 'pip install "tinyldm[cuda12]"', '"cpu"']
    try:
        assert_mistake(call(*TRAIN, tmp_path / "new", "--device", "cuda"), *says)
        assert_mistake(call("demo", "--out", tmp_path / "new", "--device", "cuda"), *says)
        assert_mistake(call("sample", run, PROMPT, "--device", "cuda"), *says)
        assert_mistake(call("eval", run, "--device", "cuda"), *says)
    finally:
        backend._cupy.cache_clear()
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------- in a process of its own


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "tinyldm", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"}, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "line", "stage"),
    mostly_slow(
        [
            (signal.SIGINT, "stage 1 of 2", "autoencoder"),
            (signal.SIGTERM, "stage 2 of 2", "denoiser"),
            (signal.SIGHUP, "stage 2 of 2", "denoiser"),
        ],
        (signal.SIGINT, "stage 1 of 2", "autoencoder"),
    ),
)
def test_interrupted_with_everything_saved(call, tmp_path, number, line, stage):
    """Stopped in either stage, it says so in one line, and what there is can be used."""
    run = tmp_path / "run"
    with start(*TRAIN, run) as process:
        for said in process.stderr:
            if said.startswith(line):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == f"tinyldm: stopped by {number.name}; everything is saved"
    state = load_state(run)
    assert state.stage == stage and not state.finished and state.step > 0
    result = call("sample", run, PROMPT, "-o", tmp_path / "a.png")
    if stage == "autoencoder":
        assert result.code == 2 and "--resume goes on with it" in result.err.splitlines()[-1]
    else:
        assert (result.code, result.err) == (0, "")


@pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="pipes of another kind")
def test_a_reader_that_has_gone_away(run, tmp_path):
    """As in `tinyldm sample … | head -0`: nobody is told, because nobody listens."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tinyldm", "sample", run, PROMPT, "-o", tmp_path / "a.png"],
            stdout=writing, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.png").exists()


def test_an_environment_that_cannot_be_gets_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "tinyldm", "sample", "run", "x"], capture_output=True, text=True,
        env=os.environ | {"TINYLDM_KERNELS": "x"},
    )  # fmt: skip
    says = "tinyldm: TINYLDM_KERNELS: expected \"plain\" or nothing, found 'x'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", says)
