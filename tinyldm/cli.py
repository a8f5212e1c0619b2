"""The command line: `tinyldm demo`, `train`, `sample`, `eval`.

Only results go to stdout. A user's mistake is one line on stderr and exit code 2, a failure while
running is 1, and 130 or 143 mean: interrupted, with everything saved. Heavy modules are imported
by the commands that need them, so that `--help` is immediate.
"""

import argparse
import math
import os
import sys
import time

from tinyldm import __version__

PRESETS = ("demo", "tiny")


def main(arguments=None):
    """Run one command; → exit code."""
    options = parser().parse_args(arguments)
    try:
        code = options.command(options) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the results has gone: tell Python not to try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"tinyldm: {error}", file=sys.stderr)
        return code


def _exit_code(error):
    from tinyldm.backend import DeviceError
    from tinyldm.training.loop import Diverged, Stopped

    if isinstance(error, Stopped):
        return 128 + error.number
    if isinstance(error, (Diverged, MemoryError)):
        return 1
    if isinstance(error, (ValueError, DeviceError, OSError)):
        return 2  # every reader and every model says so in one line
    return None


def parser():
    top = argparse.ArgumentParser(
        prog="tinyldm",
        description="A whole Stable Diffusion, trained and sampled in NumPy.",
        epilog='start with: tinyldm demo    then: tinyldm sample runs/demo "a large red circle on '
        'blue at the left" -o circle.png',
    )
    top.add_argument("--version", action="version", version=f"tinyldm {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, text):
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(command=function)
        return one

    demo = command("demo", run_demo, "train on captioned shapes in five minutes, and score it")
    _add_run(demo, out="runs/demo")
    demo.set_defaults(data="shapes", preset="demo")

    train = command("train", run_train, "train both stages on shapes or on a folder of pictures")
    train.add_argument("--data", default="shapes", help='"shapes" or a folder (default: shapes)')
    train.add_argument("--preset", choices=PRESETS, default="demo", help="size (default: demo)")
    _add_run(train, out=None)

    sample = command("sample", run_sample, "paint pictures from a caption")
    sample.add_argument("run", metavar="RUN", help="folder of a run, or of a Stable Diffusion")
    sample.add_argument("prompt", metavar="PROMPT")
    sample.add_argument("-o", "--output", metavar="FILE", default="sample.png",
                        help="a picture; several get numbers (default: sample.png)")  # fmt: skip
    sample.add_argument("--negative", default="", help="what to lead away from")
    sample.add_argument("--steps", type=_whole(1), help="of the sampler (default: the run's)")
    sample.add_argument("--guidance", type=_number, help="1 is none (default: the run's)")
    sample.add_argument("--sampler", help="ddim or ddpm (default: the run's)")
    sample.add_argument("--seed", type=_whole(0), default=0, help="of the noise (default: 0)")
    sample.add_argument("--n", type=_whole(1), default=1, help="pictures (default: 1)")
    sample.add_argument("--size", type=_size, help="pixels, S or HEIGHTxWIDTH")
    _add_device(sample)

    evaluate = command("eval", run_eval, "score a run that was trained on shapes")
    evaluate.add_argument("run", metavar="RUN")
    evaluate.add_argument("--captions", type=_whole(2), default=500, help="to paint (default: 500)")
    evaluate.add_argument("--steps", type=_whole(1), help="of the sampler (default: the run's)")
    evaluate.add_argument("--guidance", type=_number, help="1 is none (default: the run's)")
    _add_device(evaluate)
    return top


def _add_run(command, out):
    text = "folder of the run" + (f" (default: {out})" if out else "")
    command.add_argument("--out", default=out, required=out is None, metavar="RUN", help=text)
    command.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    command.add_argument("--seed", type=_whole(0), default=0, help="of everything (default: 0)")
    _add_device(command)


def _add_device(command):
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")


def _whole(least):
    def parse(text):
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number ≥ {least}, found {text!r}")
        return number

    return parse


def _number(text):
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")
    return number


def _size(text):
    try:
        height, x, width = text.lower().partition("x")
        return int(height), int(width if x else height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected S or HEIGHTxWIDTH, found {text!r}") from None


# --------------------------------------------------------------------------------------- commands


def run_train(options):
    import dataclasses

    from tinyldm.training.loop import train
    from tinyldm.training.presets import PRESETS

    config = dataclasses.replace(PRESETS[options.preset], data=options.data, seed=options.seed)
    _say_device(options)
    started = time.monotonic()
    train(options.out, config, options.resume, options.device, say=_say)
    _say(f"trained in {_minutes(time.monotonic() - started)}")
    print(options.out)


def run_demo(options):
    from pathlib import Path

    run_train(options)
    _say("scoring: 200 captions are painted and read back by rule")
    options.run, options.captions, options.steps, options.guidance = options.out, 200, None, None
    run_eval(options)
    samples = Path(options.out) / "samples"
    _say(
        f"\nLook at {samples / 'samples.png'} (its last six captions pair a colour with a shape as "
        f"no training picture did),\nat {samples / 'reverse.webp'} (noise becoming pictures), and "
        "try:\n"
        f'  tinyldm sample {options.out} "a large red circle on blue at the left" -o circle.png\n'
        f'  tinyldm sample {options.out} "a small white triangle on black at the top" --n 4 '
        "--seed 7 -o triangle.png\n"
        f"  tinyldm eval {options.out}"
    )


def run_sample(options):
    from pathlib import Path

    from tqdm import tqdm

    from tinyldm.evaluation.pictures import picture_format, save_picture
    from tinyldm.pipeline import Pipeline

    output = Path(options.output)
    picture_format(output)  # complains before the work rather than after it
    pipeline = Pipeline.load(_whole_run(options.run), options.device)
    steps = options.steps or pipeline.defaults["steps"]
    progress = tqdm(
        pipeline.denoise(
            [options.prompt] * options.n, options.negative, options.steps, options.guidance,
            options.sampler, options.seed, options.size,
        ),
        total=steps, desc="painting", unit="step", disable=None,
    )  # fmt: skip
    *_, (latents, _) = progress
    for i, picture in enumerate(pipeline.decode(latents)):
        name = output if options.n == 1 else output.with_stem(f"{output.stem}-{i}")
        save_picture(name, _image(picture))
        print(name)


def run_eval(options):
    import json
    from pathlib import Path

    from tinyldm.evaluation.metrics import evaluate_shapes, table
    from tinyldm.files import replacing
    from tinyldm.pipeline import Pipeline
    from tinyldm.training.state import load_notes

    run = _whole_run(options.run)
    data = load_notes(run)["config"].data
    if data != "shapes":
        raise ValueError(f"{run}: was trained on {data}; eval scores runs trained on shapes")
    pipeline = Pipeline.load(run, options.device)
    result = evaluate_shapes(pipeline, options.captions, options.steps, options.guidance)
    with replacing(Path(run) / "eval.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


def _whole_run(run):
    """`run`, its component folders made again if the last export was cut off."""
    from pathlib import Path

    from tinyldm.training.loop import rebuild
    from tinyldm.training.state import state_files

    if not (Path(run) / "model_index.json").exists() and state_files(run):
        _say(f"{run}: the export is not whole; making it again from the state")
        rebuild(run)
    return run


def _image(picture):
    from PIL import Image

    return Image.fromarray(picture)


def _say_device(options):
    from tinyldm.backend import describe

    _say(f"tinyldm {__version__}: {describe(options.device)}")


def _say(line):
    print(line, file=sys.stderr, flush=True)


def _minutes(seconds):
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"
