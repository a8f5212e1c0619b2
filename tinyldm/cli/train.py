"""`tinyldm train`: train a new run, or resume one."""

import time
from argparse import ArgumentParser, Namespace

from tinyldm import __version__
from tinyldm.cli.arguments import add_device, add_options, chosen, say
from tinyldm.machine import duration
from tinyldm.models import ClassNames
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.threads import describe_device
from tinyldm.training.config import IMAGES, LEARNT, MODEL, RESOURCES, Config
from tinyldm.training.metrics import Diverged
from tinyldm.training.overfit import overfit, report
from tinyldm.training.presets import NewRun, make_config
from tinyldm.training.run import resume, train

STAY = ("factor", "channels", "accumulate", "decay")  # a resumed run keeps these


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of a run."""
    for title in (IMAGES, MODEL, LEARNT, RESOURCES):
        parser.add_argument_group(title)
    for cls in (NewRun, Config):
        add_options(parser, cls)
    parser.add_argument(
        "--overfit",
        action="store_true",
        default=None,
        help="only test that the loss falls on a single batch (needs no --out)",
    )
    add_run(parser, out=None)


def add_run(parser: ArgumentParser, out: str | None) -> None:
    """Add the folder of a run, and what to do with a run that is already there."""
    text = "folder of the run" + (f" (default: {out})" if out else "")
    parser.add_argument("--out", default=out, metavar="RUN", help=text)
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true", help="resume the run in RUN")
    old.add_argument("--overwrite", action="store_true", help="replace the run in RUN")
    add_device(parser)


def run(options: Namespace) -> None:
    """Train a new run, or resume one, and print its folder."""
    if options.out is None and not options.overfit:
        options.parser.error("the following arguments are required: --out")
    if options.overfit and options.resume:
        options.parser.error("--overfit: starts a new model; leave out --resume")
    say(f"tinyldm {__version__}: {describe_device(options.device)}")
    started = time.monotonic()
    settings = chosen(options, NewRun, Config)
    if options.resume:
        for name in settings.keys() & set(STAY):
            options.parser.error(f"--{name}: a resumed run keeps it; leave it out")
        pipeline = resume(options.out, options.device, say=say, **settings)
    else:
        config = make_config(**settings)
        if options.overfit:
            if not report(overfit(config, options.device, say), say):
                raise Diverged("the self-test has failed: on a single batch the loss does not fall")
            return
        pipeline = train(options.out, config, options.device, options.overwrite, say=say)
    say(
        f"trained in {duration(time.monotonic() - started)}; generate with: tinyldm sample "
        f"{options.out} {_what_to_say(pipeline)} -o image.png"
    )
    print(options.out)


def _what_to_say(pipeline: Pipeline) -> str:
    """Return the arguments that sampling needs: a prompt, and images that the task needs."""
    prompt = pipeline.tokenizer.names[0] if isinstance(pipeline.tokenizer, ClassNames) else "…"
    given = {"generation": "", "inpainting": " --image FILE --mask FILE"}
    return f'"{prompt}"' + given.get(pipeline.task, " --image FILE")
