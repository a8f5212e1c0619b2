"""`tinyldm experiment`: try a claim of the field at small scale."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from importlib import import_module

from tinyldm.cli.arguments import add_options, chosen, one_of, say
from tinyldm.experiments.trained import trained_run
from tinyldm.options import option, path_of
from tinyldm.training.run import whole_run

EXPERIMENTS = {  # name → the question that it answers
    "latent-vs-pixel": "is diffusion cheaper in latents than in pixels, at the same quality?",
    "guidance": "how strongly should the caption be followed?",
    "samplers": "how many steps does which sampler need?",
    "schedules": "which noise schedule, and what should the network predict?",
}
ON_A_RUN = ("guidance", "samplers")  # the experiments that take a trained run


@dataclass(frozen=True)
class Length:
    """Length of an experiment."""

    seconds: float = option("seconds that each network is trained", 240.0, least=1, most=1_000_000)
    captions: int | None = option(
        "number of images to generate for a measurement", None, least=4, most=100_000, metavar="N",
        default_text="the experiment's",
    )  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Add the experiment's name, duration, run and output folder."""
    texts = "; ".join(f"{name}: {text}" for name, text in EXPERIMENTS.items())
    parser.add_argument("name", metavar="NAME", type=one_of(EXPERIMENTS), help=texts)
    add_options(parser, Length)
    text = "a run on shapes for guidance and samplers (default: train the demo's in DIR/run)"
    parser.add_argument("--run", dest="run_folder", metavar="RUN", help=text)
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="folder for results.json, tables and images"
    )


def run(options: Namespace) -> None:
    """Run one experiment, on seconds of training or on a trained run, and print its table."""
    module = import_module(f"tinyldm.experiments.{options.name.replace('-', '_')}")
    out = path_of("--out", options.out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a folder, or nothing, found a file")
    length = Length(**chosen(options, Length))
    subject = seconds = length.seconds
    if options.name in ON_A_RUN:
        run = None if options.run_folder is None else whole_run(options.run_folder, say)
        subject = trained_run(run, seconds, out, say)
    elif options.run_folder is not None:
        options.parser.error(f"--run: {options.name} trains its own model; leave it out")
    out.mkdir(parents=True, exist_ok=True)
    module.run(subject, out, say, length.captions or module.CAPTIONS)
    print((out / "table.md").read_text(encoding="utf-8"), end="")
