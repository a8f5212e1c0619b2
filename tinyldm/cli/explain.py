"""`tinyldm explain`: write the pages that explain a run."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from tinyldm.cli.arguments import add_device, say
from tinyldm.cli.evaluate import add_moved_data, data_of
from tinyldm.explain.report import explain
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.run import whole_run


def add_arguments(parser: ArgumentParser) -> None:
    """Add the run to explain."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of the run")
    add_moved_data(parser)
    add_device(parser)


def run(options: Namespace) -> None:
    """Write report.html and live.html into the folder of the run."""
    run = Path(whole_run(options.run_folder, say))
    _, training, held_out = data_of(run, options.data)
    for page in explain(run, Pipeline.load(run, options.device), training, held_out, say):
        print(page)
    say("open them in a browser: each is one file, and needs no network")
