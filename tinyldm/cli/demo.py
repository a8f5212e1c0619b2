"""`tinyldm demo`: train on the built-in shapes, and score the result."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from tinyldm.cli import evaluate
from tinyldm.cli import train as training
from tinyldm.cli.arguments import add_options, say
from tinyldm.training.config import Config
from tinyldm.training.presets import NewRun

OUT = "runs/demo"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of a training run that the demo has."""
    add_options(parser, NewRun, ("minutes",))
    add_options(parser, Config, ("seed", "keep"))
    training.add_run(parser, out=OUT)
    parser.set_defaults(preset="demo", overfit=None)


def run(options: Namespace) -> None:
    """Train on the built-in shapes, and score the result."""
    training.run(options)
    say("scoring: 200 images are generated and read back by rule")
    options.run_folder, options.captions = options.out, 200
    options.steps = options.guidance = options.data = options.seed = None
    evaluate.run(options)
    samples = Path(options.out) / "samples"
    say(
        f"\nLook at {samples / 'samples.png'} (its last six captions pair a colour with a shape as "
        f"no training image did),\nat {samples / 'reverse.webp'} (noise becoming images), and "
        "try:\n"
        f'  tinyldm sample {options.out} "a large red circle on blue at the left" -o circle.png\n'
        f'  tinyldm sample {options.out} "a small white triangle on black at the top" --n 4 '
        "--seed 7 -o triangle.png\n"
        "see what it has learnt, step by step, in a page:\n"
        f"  tinyldm explain {options.out}\n"
        "or go on to better images:\n"
        f"  tinyldm demo --out {options.out} --resume --minutes 5"
    )
