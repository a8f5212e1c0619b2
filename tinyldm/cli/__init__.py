"""The command line: `tinyldm demo`, `train`, `sample`, `eval`, `experiment`, `doctor`.

Only results go to stdout. A user's mistake is one line on stderr and exit code 2, a failure while
running is 1, and 130 or 143 mean: interrupted, with everything saved. What the commands do is in
`commands.py` and `painting.py`, imported once there is something to do: `--help` is immediate.
"""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from tinyldm import __version__
from tinyldm.cli.arguments import Parser, number, one_of, size, whole

PRESETS = {  # name → what it takes, for --help
    "tiny": "16 px, seconds, to try things out",
    "demo": "32 px, 5 minutes",
    "medium": "64 px, 30 minutes",
    "large": "128 px, 3 hours",
}
COMMANDS = ("demo", "train", "sample", "eval", "experiment", "doctor")
CHOICES = {  # option of train → what it may be, the first by default
    "first_stage": ("kl", "vq", "none"),
    "task": ("generation", "inpainting", "upscaling-2", "upscaling-4", "layout"),
    "condition": ("text", "class-token", "class-time", "none"),
    "prediction": ("v_prediction", "epsilon", "sample"),
    "schedule": ("linear", "scaled_linear", "cosine", "zero_snr"),
    "weighting": ("simple", "min-snr", "variational"),
    "decay": ("cosine", "linear", "constant"),
}
FACTORS = ("1", "2", "4", "8", "16")
OF_TRAIN = (  # options of train that demo does without
    *("data", "size", "grey", "flip", "skip_bad", *CHOICES, "noise_offset"),
    *("factor", "channels", "adversarial"),
    *("minutes", "accumulate", "checkpointing", "overfit"),
)
EXPERIMENTS = {  # name → what it is about, for --help
    "latent-vs-pixel": "is diffusion cheaper in latents than in pixels, at the same quality?",
    "guidance": "how strongly should the caption be followed?",
    "samplers": "how many steps does which sampler need?",
    "schedules": "which noise schedule, and what should the network predict?",
}
SAMPLERS = ("ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpm++2m", "dpm++2m_sde")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; → exit code."""
    try:
        options, extra = parser().parse_known_args(arguments)
        if extra:
            options.parser.refuse(extra[0])
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            run(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("tinyldm: interrupted", file=sys.stderr)
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


def run(options: argparse.Namespace) -> None:
    """Do what was asked for, and import no more than that needs."""
    if options.command == "doctor":  # which works where a package is missing
        from tinyldm.cli import doctor

        report = doctor.examine(options.device)
        print(report.to_json() if options.json else report)
        return
    from tinyldm.cli import commands
    from tinyldm.cli import sample as painting

    module = painting if options.command == "sample" else commands
    getattr(module, f"run_{options.command}")(options)


def _show_warning(message, *_, **__):
    print(f"tinyldm: {message}", file=sys.stderr)


def _exit_code(error):
    from tinyldm.backend import DeviceError
    from tinyldm.training.loop import Diverged
    from tinyldm.training.signals import Stopped

    if isinstance(error, Stopped):
        return 128 + error.number
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    if isinstance(error, (Diverged, MemoryError)) or full:
        return 1
    if isinstance(error, (ValueError, DeviceError, OSError)):
        return 2  # every reader and every model says so in one line
    return None


def parser() -> Parser:
    """The commands and their options."""
    top = Parser(
        prog="tinyldm",
        allow_abbrev=False,
        description="A whole Stable Diffusion, trained and sampled in NumPy.",
        epilog='start with: tinyldm demo    then: tinyldm sample runs/demo "a large red circle on '
        'blue at the left" -o circle.png    if anything is odd: tinyldm doctor',
    )
    top.add_argument("--version", action="version", version=f"tinyldm {__version__}")
    top.set_defaults(parser=top)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name, text):
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.set_defaults(command=name, parser=one)
        return one

    demo = command("demo", "train on captioned shapes in five minutes, and score it")
    _add_run(demo, out="runs/demo")
    demo.set_defaults(**dict.fromkeys(OF_TRAIN), preset="demo")

    train = command("train", "train both stages on shapes or on a folder of pictures")
    _add_training(train)
    _add_run(train, out=None)

    sample = command("sample", "paint pictures from a caption")
    sample.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="folder of a run, or a Stable Diffusion: a folder, or one .safetensors file",
    )
    sample.add_argument("prompt", metavar="PROMPT", nargs="?")
    sample.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="a picture; several get numbers (default: sample.png)",
    )
    sample.add_argument(
        "--again",
        metavar="FILE",
        type=Path,
        help="paint this PNG once more, by what it says of itself",
    )
    sample.add_argument("--negative", help="what to lead away from")
    _add_sampling(sample)
    sample.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: the run's)")
    sample.add_argument("--seed", type=whole(0), help="of the noise (default: 0)")
    sample.add_argument("--n", type=whole(1, 4096), help="pictures (default: 1)")
    sample.add_argument("--size", type=size, help="pixels, S or HEIGHTxWIDTH")
    _add_picture(sample)
    _add_device(sample)

    evaluate = command("eval", "score a run, on shapes or on any pictures")
    evaluate.add_argument("run", metavar="RUN")
    evaluate.add_argument("--data", metavar="FOLDER", help="where its pictures are now")
    evaluate.add_argument(
        "--captions", type=whole(4, 100_000), default=500, help="to paint (default: 500)"
    )
    evaluate.add_argument(
        "--classifier-seconds", type=number(0, 100_000), default=30.0, metavar="S",
        help="to train what compares pictures; 0: compare latents (default: 30)",
    )  # fmt: skip
    _add_sampling(evaluate)
    _add_device(evaluate)

    experiment = command("experiment", "try a claim of the field at small scale")
    texts = "; ".join(f"{name}: {text}" for name, text in EXPERIMENTS.items())
    experiment.add_argument("name", metavar="NAME", type=one_of(EXPERIMENTS), help=texts)
    experiment.add_argument(
        "--seconds",
        type=number(1, 1_000_000),
        default=240.0,
        help="that each network is trained (default: 240)",
    )
    text = "of guidance and samplers: a run on shapes (default: train the demo's in DIR/run)"
    experiment.add_argument("--run", metavar="RUN", help=text)
    experiment.add_argument(
        "--out", metavar="DIR", required=True, help="folder for results.json, tables and pictures"
    )

    doctor = command("doctor", "is everything there, and how fast is it?")
    doctor.add_argument("--json", action="store_true", help="for programs")
    _add_device(doctor)
    return top


def _add_run(command, out):
    text = "folder of the run" + (f" (default: {out})" if out else "")
    command.add_argument("--out", default=out, metavar="RUN", help=text)
    old = command.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    old.add_argument("--overwrite", action="store_true", help="replace the run in RUN")
    command.add_argument("--seed", type=whole(0), help="of everything (default: 0)")
    command.add_argument(
        "--keep", type=whole(1, 1000), help="states on disk, the last ones (default: 2)"
    )
    _add_device(command)


def _add_training(command):
    def group(title):
        added = command.add_argument_group(title)

        def add(name, text, **options):
            if not options:
                options = {"action": "store_true", "default": None}
            added.add_argument(f"--{name}", help=text, **options)

        return add

    def choice(add, name, text):
        words = CHOICES[name]
        text = f"{text}: {', '.join(words)} (default: {words[0]})"
        add(name.replace("_", "-"), text, type=one_of(words))

    add = group("the pictures")
    text = "pictures, or IDX (MNIST), CIFAR-10's .bin or .npz (default: shapes, drawn here)"
    add("data", text, metavar="FOLDER")
    text = "pixels, S or HEIGHTxWIDTH; every picture is cropped in its middle and resized"
    add("size", f"{text} (default: the preset's)", type=size)
    add("grey", "one channel, how bright a picture is")
    add("flip", "train on the mirror images, too (not where captions say left and right)")
    add("skip-bad", "leave out files that cannot be read, and name them")

    add = group("the model")
    presets = "; ".join(f"{name}: {text}" for name, text in PRESETS.items())
    text = f"{presets} (default: the smallest for --size, else demo)"
    add("preset", text, type=one_of(PRESETS))
    choice(add, "first_stage", "a Gaussian, a codebook, or diffusion in pixels")
    text = "pixels of a side for each latent, 1, 2, 4, 8 or 16 (default: the preset's)"
    add("factor", text, type=lambda text: int(one_of(FACTORS)(text)), metavar="F")
    text = "of the latents (default: the preset's)"
    add("channels", text, type=whole(1, 64), metavar="C")
    choice(add, "task", "what the U-Net sees beside the noise")
    choice(add, "condition", "what says what to paint")

    add = group("what is learnt")
    choice(add, "prediction", "of the U-Net")
    choice(add, "schedule", "of noise")
    choice(add, "weighting", "of the loss by t")
    text = "of a noise that is the same all over a channel (default: 0)"
    add("noise-offset", text, type=number(0, 1), metavar="X")
    choice(add, "decay", "of the learning rate")
    text = "of a discriminator in the second half of stage 1 (default: 0)"
    add("adversarial", text, type=number(0, 1000), metavar="WEIGHT")

    add = group("time and memory")
    text = "of training (default: the preset's); with --resume, from now on"
    add("minutes", text, type=number(0.01, 100_000))
    text = "work through each batch in N parts, for less memory (default: 1)"
    add("accumulate", text, type=whole(1, 1024), metavar="N")
    add("checkpointing", "forget activations and make them again when needed, for less memory")
    add("overfit", "only a self-test: does the loss fall on a single batch? (needs no --out)")


def _add_sampling(command):
    command.add_argument("--steps", type=whole(1), help="of the sampler (default: the run's)")
    command.add_argument("--guidance", type=number(), help="1 is none (default: the run's)")


def _add_picture(command):
    def path(name, text, kind=Path):
        command.add_argument(name, metavar="FILE", type=kind, help=text)

    path("--image", "a picture to begin with")
    path("--mask", "where this picture is white the image is painted anew, the rest of it stays")
    command.add_argument(
        "--strength",
        type=number(0.001, 1),
        help="how far from the image, 0…1 (default: 0.8, with a mask 1)",
    )
    command.add_argument(
        "--rescale",
        type=number(0, 1),
        help="of the guidance, 0…1, against burnt colours (default: 0)",
    )
    command.add_argument(
        "--variation",
        type=number(0, 1),
        help="how far from the picture of --seed, 0…1; each of --n goes another way",
    )
    command.add_argument("--variation-seed", type=whole(0), help="of these ways (default: 0)")
    path("--film", "a strip of the steps (.png), or an animation of them (.webp, .gif)")
    command.add_argument("--every", type=whole(1), help="step of the film (default: ten in all)")
    command.add_argument(
        "--tile",
        type=whole(0),
        help="pixels; decode in tiles of this side, for less memory "
        "(default: 512 above 768x768; 0: never)",
    )
    path("--vae", "another autoencoder, a folder or a file", str)


def _add_device(command):
    command.add_argument(
        "--device", type=one_of(("cpu", "cuda")), default="cpu", help="cpu or cuda (default: cpu)"
    )
