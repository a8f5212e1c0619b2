"""Wrong commands, folders, images, runs and configs: what each is told, and that no harm is done.

One row a mistake: how to make it, and what the one line about it must say. The exit code is 2,
nothing goes to stdout, there is no traceback, and no file is written, changed or lost.
"""

import dataclasses
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tinyldm import cli
from tinyldm.checkpoints.diffusers_folder import CHECKSUMS
from tinyldm.checkpoints.safetensors import load_metadata, load_weights, save_weights
from tinyldm.training import presets, snapshots
from tinyldm.training import run as runs
from tinyldm.training.config import Stage

STAGE = Stage(batch=4, rate=1e-3, warmup=2, ema=0.9, steps=1)
SMALL = dataclasses.replace(
    presets.PRESETS["tiny"], images=30, autoencoder=STAGE, denoiser=STAGE, vae_widths=(4, 8),
    unet_widths=(8,), unet_attention=(True,), groups=4, heads=2, text_width=8, steps=2,
)  # fmt: skip
TRAIN = "train --preset tiny --out {new}"
SAMPLE = "sample {run} caption -o {image}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("wrong uses") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("data", "first_stage", "finished"):
            patch.setattr(snapshots, name, lambda *args: None)
        runs.train(run, SMALL, say=lambda line: None)
    return run


@pytest.fixture
def world(tmp_path, finished):
    """A run, a folder of images, and names for what is not there."""
    names = {
        name: tmp_path / name for name in ("run", "images", "new", "missing", "image.png", "file")
    }
    shutil.copytree(finished, names["run"])
    names["images"].mkdir()
    for i in range(3):
        Image.new("RGB", (20, 30), (80 * i, 90, 10)).save(names["images"] / f"{i}.png")
    names["file"].write_text("in the way")
    names["image"] = names.pop("image.png")
    return names


def contents(folder):
    return {
        path: path.is_dir() or path.is_symlink() or path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


# ---------------------------------------------------------------------------- how to spoil a world


def remove(name):
    def spoil(world):
        path = world["run"] / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def replace(name, content):
    def spoil(world):
        (world["run"] / name).write_bytes(content)

    return spoil


def edit(name, **changes):
    """Change keys of a JSON file; None removes one."""

    def spoil(world):
        file = world["run"] / name
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        (world["run"] / CHECKSUMS).unlink()  # as a folder of others, which nobody has edited

    return spoil


def weights(change):
    def spoil(world):
        file = world["run"] / "unet/diffusion_pytorch_model.safetensors"
        params = load_weights(file)
        change(params)
        save_weights(file, params)

    return spoil


def add_image(name, content):
    def spoil(world):
        (world["images"] / name).write_bytes(content)

    return spoil


def cut_off(name):
    def spoil(world):
        file = world["run"] / name
        file.write_bytes(file.read_bytes()[:-100])

    return spoil


def only_stage_1(world):
    """As if it had been stopped there."""
    (last,) = sorted(world["run"].glob("training/state-*2.safetensors"))
    last.unlink()
    (state,) = world["run"].glob("training/state-*.safetensors")
    notes = json.loads(load_metadata(state)["tinyldm"]) | {"stage": "autoencoder"}
    save_weights(state, load_weights(state), {"tinyldm": json.dumps(notes)})
    (world["run"] / "model_index.json").unlink()


def only_damaged(world):
    _, last = sorted(world["run"].glob("training/state-*.safetensors"))
    for state in world["run"].glob("training/state-*.safetensors"):
        state.unlink() if state != last else state.write_bytes(b"")


def locked_elsewhere(world):
    (world["run"] / ".lock").write_text('{"process": 7, "host": "elsewhere"}')


def generated_elsewhere(world):
    assert cli.main(SAMPLE.format(**world).split()) == 0
    weights(lambda params: params["conv_in.bias"].__iadd__(1))(world)
    (world["run"] / CHECKSUMS).unlink()


def add_folder(name):
    def spoil(world):
        (world["new"] / name).mkdir(parents=True)
        (world["new"] / name / "mine.png").write_bytes(b"precious")

    return spoil


def without_training(world):
    shutil.rmtree(world["run"] / "training")


def images_in_run(world):
    shutil.rmtree(world["run"] / "samples", ignore_errors=True)
    world["images"].rename(world["run"] / "samples")


def generated_with_notes(**changes):
    """An image whose notes are not what they were."""

    def spoil(world):
        assert cli.main(SAMPLE.format(**world).split()) == 0
        with Image.open(world["image"]) as image:
            image.load()
            notes = PngInfo()
            for key, text in (image.text | changes).items():
                notes.add_itxt(key, text)
            image.save(world["image"], pnginfo=notes)

    return spoil


def turn_into_pickle(world):
    replace("unet/diffusion_pytorch_model.safetensors", b"\x80\x02}q\x00.")(world)


LAST_STATE = "training/state-00000002.safetensors"

MISTAKES = [
    # commands and options
    ("", None, "required: COMMAND"),
    ("smaple {run} caption", None, "found 'smaple'; did you mean 'sample'"),
    ("demo --sede 3", None, "unknown option '--sede'; did you mean '--seed'"),
    (f"{TRAIN} --sede 3", None, "unknown option '--sede'; did you mean '--seed'"),
    (
        "train --preset medum --out {new}",
        None,
        "medium or large, found 'medum'; did you mean 'medi",
    ),
    ("train --preset tiny", None, "required: --out"),
    (f"{TRAIN} --seed -1", None, "--seed: expected an integer ≥ 0, found '-1'"),
    (f"{TRAIN} --size 0", None, "size: expected a multiple of 2 .* found 0"),
    (f"{TRAIN} --task inpaint", None, "--task: expected generation, .*did you mean 'inpainting'"),
    (f"{TRAIN} --condition class", None, "--condition: expected text, class-token, .*'class'"),
    (f"{TRAIN} --factor 3", None, "--factor: expected 1, 2, 4, 8 or 16, found '3'"),
    (f"{TRAIN} --factor 4 --first-stage none", None, "factor: expected 1, as there is with first"),
    (f"{TRAIN} --schedule zero_snr --prediction epsilon", None, "does not lead back; take v_pred"),
    (f"{TRAIN} --size 16x32", None, "size: shapes are drawn in squares; other sizes need --data"),
    (f"{TRAIN} --size 17", None, "multiple of 2 .* found 17; the nearest are 16 and 18"),
    (f"{TRAIN} --minutes nan", None, "--minutes: expected a number 0.01…100000, found 'nan'"),
    *(
        (command, None, "expected the name of a file or folder, found ''")
        for command in (
            "train --preset tiny --out ''",
            "train --out '' --resume",
            "sample '' caption",
            "eval ''",
            "experiment guidance --out ''",
            "experiment guidance --out {new} --run ''",
            "sample {run} caption --vae ''",
            "demo --out ''",
        )
    ),
    (f"{TRAIN} --data ''", None, "data: expected the name of a folder, found ''"),
    ("sample {run} caption -o ''", None, "expected the name of an image"),
    (f"{TRAIN} --keep 0", None, "--keep: expected an integer 1…1000, found '0'"),
    (f"{TRAIN} --device gpu", None, "--device: expected cpu or cuda, found 'gpu'"),
    (f"{TRAIN} --resume --overwrite", None, "--overwrite: not allowed with argument --resume"),
    ("sample {run}", None, "expected RUN and PROMPT"),
    ("sample {run} a red circle", None, "unexpected 'red'; a PROMPT of several words needs quotes"),
    (f"{SAMPLE} --steps 0", None, "--steps: expected an integer ≥ 1, found '0'"),
    (f"{SAMPLE} --steps 1001", None, "steps: expected 1…1000, found 1001"),
    (f"{SAMPLE} --steps {10**18}", None, f"steps: expected 1…1000, found {10**18}"),
    (f"{SAMPLE} --n {10**9}", None, "--n: expected an integer 1…4096"),
    (f"{SAMPLE} --guidance inf", None, "--guidance: expected a number -1000…1000, found 'inf'"),
    (f"{SAMPLE} --sampler eular", None, "found 'eular'; did you mean 'euler'"),
    (f"{SAMPLE} --sampler dimm", None, "found 'dimm'; did you mean 'ddim'"),
    (f"{SAMPLE} --size 15", None, "multiples of 2, found 15×15; the nearest is 16×16"),
    (f"{SAMPLE} --size 16x", None, "--size: expected S or HEIGHTxWIDTH, found '16x'"),
    ("sample {run} caption -o {new}", None, "expected the name of an image, such as new.png"),
    ("sample {run} caption -o {file}/a.png", None, "file"),
    ("sample --reproduce {image} --steps 3", None, "leave out the steps"),
    ("sample --reproduce {image}", None, "No such file.*image.png"),
    (
        "sample --reproduce {images}/0.png",
        None,
        "0.png: expected a PNG generated by `tinyldm sample`",
    ),
    (
        "sample {run} --reproduce {image}",
        generated_elsewhere,
        "generated with weights .* these are",
    ),
    ("eval {run} --captions 3", None, "--captions: expected an integer 4…100000, found '3'"),
    (
        "eval {run} --classifier-seconds -1",
        None,
        "--classifier-seconds: expected a number 0…100000, found '-1'",
    ),
    # folders and images
    (
        f"{TRAIN} --data {{missing}}",
        None,
        "expected a folder of images, found nothing of that name",
    ),
    (f"{TRAIN} --data {{file}}", None, "expected a folder of images, found a file"),
    (
        f"{TRAIN} --data {{run}}/training",
        None,
        "no image among its 3 files; formats read are .png",
    ),
    (
        "train --preset tiny --out {images}/run --data {images}",
        None,
        "lies in the folder of images",
    ),
    (
        f"{TRAIN} --data {{images}}",
        add_image("b.png", b""),
        "1 problems with 4 .*\n  .*b.png: not an image",
    ),
    (
        f"{TRAIN} --data {{images}}",
        add_image("b.jpg", b"<html>"),
        "b.jpg: not an image in a form",
    ),
    (
        f"{TRAIN} --data {{images}}",
        add_image("0.txt", b"\xff\xfe"),
        "0.txt: expected text in UTF-8",
    ),
    (
        f"{TRAIN} --data {{images}}",
        add_image("metadata.jsonl", b"{}\n"),
        "line 1: expected .*text",
    ),
    # runs
    ("train --preset tiny --out {run}", None, "holds a run already; go on with it .--resume"),
    ("train --preset tiny --out {file}", None, "expected a folder, or nothing, found a file"),
    (f"{TRAIN} --resume", None, "new: holds no run"),
    ("train --out {run} --resume --seed 7", None, "--seed 7: the run began with 0, which stays"),
    ("train --out {run} --resume --size 64", None, "--size 64: the run began with 16"),
    ("train --out {run} --resume --data {images}", None, "3 images and captions are no longer"),
    ("train --out {run} --resume", only_damaged, "cut off .*; there is no state before it"),
    ("train --out {run} --resume", locked_elsewhere, "process 7 on elsewhere trained into it"),
    ("train --out / --overwrite", None, "/: is the root of the file system"),
    ("sample {run} caption", only_stage_1, "has no model yet, .* --resume goes on with it"),
    (
        "sample {new} caption",
        None,
        "new: no such file or folder; expected the folder of a trained run",
    ),
    ("sample {file} caption", None, "file"),
    ("eval {images}", None, "holds no run"),
    (
        "eval {run} --captions 4",
        replace("training/classifier.safetensors", b"{}"),
        "cut off .*; remove it, and `tinyldm eval` trains another",
    ),
    (TRAIN, add_folder("samples"), "holds no run, but something else in samples"),
    (f"{TRAIN} --overwrite", add_folder("training"), "holds no run, but something else in train"),
    ("train --preset tiny --out {run}", without_training, "holds a run already"),
    (
        "train --preset tiny --out {run} --overwrite --data {run}/samples",
        images_in_run,
        "samples: lies where the run .* writes",
    ),
    ("eval {run} --data {images}", None, "no longer those that .* was trained on"),
    ("sample --reproduce {image}", generated_with_notes(picture="4 of 1"), "not those of tinyldm"),
    (
        "sample --reproduce {image}",
        generated_with_notes(sampler="dpm"),
        "found 'dpm'; did you mean",
    ),
    (
        "sample --reproduce {image}",
        generated_with_notes(size="15x15"),
        "multiples of 2, found 15×15",
    ),
    # configs and weights
    (SAMPLE, remove("unet"), "unet.config.json: missing"),
    (SAMPLE, replace("unet/config.json", b"{"), "config.json: not valid JSON"),
    (SAMPLE, replace("vae/config.json", b"[]"), "config.json: expected a JSON object, found list"),
    (
        SAMPLE,
        edit("unet/config.json", sampel_size=8),
        "unknown key 'sampel_size'; did you mean 'sampl",
    ),
    (SAMPLE, edit("unet/config.json", block_out_channels=[16]), "misshapen"),
    (SAMPLE, edit("unet/config.json", norm_num_groups=3), "unet/config.json: .* 3 groups"),
    (
        SAMPLE,
        edit("scheduler/scheduler_config.json", prediction_type="noise"),
        "'noise' is not impl",
    ),
    (SAMPLE, edit("scheduler/scheduler_config.json", beta_start=2), "0 < beta_start ≤ beta_end"),
    (SAMPLE, weights(lambda params: params.pop("conv_in.bias")), r"missing \(1\): conv_in.bias"),
    (SAMPLE, weights(lambda params: params.update(x=np.zeros(1))), r"unexpected \(1\): x"),
    (SAMPLE, cut_off("vae/diffusion_pytorch_model.safetensors"), "cut off"),
    (
        SAMPLE,
        turn_into_pickle,
        "a pickle of torch, .* turn it into safetensors .*OLD NEW.safetensors",
    ),
    (SAMPLE, replace("tokenizer/vocab.json", b"{}"), "not the files of one CLIP tokenizer"),
    (SAMPLE, remove("tokenizer/merges.txt"), "expected vocab.json and merges.txt"),
]


@pytest.mark.parametrize(
    ("command", "spoil", "message"), MISTAKES, ids=[f"{m[0]} · {m[2]}" for m in MISTAKES]
)
def test_a_mistake_gets_one_line_and_does_no_harm(
    world, tmp_path, capfd, monkeypatch, command, spoil, message
):
    for name in presets.PRESETS:
        monkeypatch.setitem(presets.PRESETS, name, dataclasses.replace(SMALL, preset=name))
    if spoil:
        spoil(world)
    before = contents(tmp_path)
    capfd.readouterr()
    try:
        code = cli.main(shlex.split(command.format(**world)))
    except SystemExit as end:
        code = end.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    told = err[err.index("tinyldm: ") :]
    assert re.search(message, told), told
    # What cannot be read is listed below the line, two spaces in.
    assert all(line.startswith("  ") for line in told.splitlines()[1:]), told
    assert contents(tmp_path) == before


def test_there_are_enough():
    assert len(MISTAKES) >= 40
