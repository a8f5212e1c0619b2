"""How fast is it? `python -m bench [TABLE …]` prints tables, and asserts nothing.

What is measured runs in turn with its rival (PyTorch with diffusers, where they are installed, in
both memory formats), and beside it stands what the machine can do at all. A ratio is PyTorch's
time, in its faster format, by ours: above 1 tinyldm is the faster one. Shown are its median over
the rounds, the lowest and the highest.

It needs a machine that does nothing else: beside one busy process PyTorch's small operations, whose
threads wait for one another, take many times as long.
"""

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

from threadpoolctl import threadpool_info

from bench import against, conv, equal, hops, image, ops, sample, scaling, sd, train
from bench.compare import Run, load_peer
from bench.measure import Limits
from bench.report import write
from tinyldm import __version__
from tinyldm.machine import keep_freed_memory, processor
from tinyldm.threads import describe_device

TABLES = {
    "train": train.table,
    "sample": sample.table,
    "sd": sd.table,
    "image": image.table,
    "conv": conv.table,
    "scaling": scaling.table,
    "ops": ops.table,
}


def main() -> None:
    """Parse the command line, print the tables that it names."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(TABLES)
    parser.add_argument("tables", metavar="TABLE", nargs="*", help=f"of {names}; none: all")
    parser.add_argument("--tiny", action="store_true", help="small sizes: does it still run?")
    parser.add_argument("--rounds", type=int, help="measurements of each time (default 9)")
    parser.add_argument("--results", type=Path, help="a Markdown file to add the tables to")
    options = parser.parse_args()
    if not TABLES.keys() >= set(options.tables):
        parser.error(f"TABLE: expected {names}, found {' '.join(options.tables)}")
    rounds = options.rounds or (2 if options.tiny else 9)
    lines = []

    def say(line):
        print(line, flush=True)
        lines.append(line)

    peer = load_peer()
    keep_freed_memory()  # as Pipeline and training do
    say(f"## {datetime.date.today()}, {processor()}")
    say("")
    for line in environment(peer):
        say(f"* {line}")
    for name in options.tables or TABLES:
        limits = Limits.measure(*((256, 2**24) if options.tiny else (2048, 2**28)))
        write(TABLES[name], Run(options.tiny, rounds, limits, peer), say)
    if options.results:
        with options.results.open("a", encoding="utf-8") as file:
            file.write("\n".join([*lines, "\n"]))


def environment(peer: ModuleType | None) -> list[str]:
    """What the numbers depend on."""
    blas = {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return [
        f"tinyldm {__version__}, Python {platform.python_version()}, {platform.system()}",
        f"{describe_device()}; BLAS threads {', '.join(map(str, sorted(blas)))}",
        f"{peer.describe_device()}, SGEMM {peer.sgemm():.0f} GF/s" if peer else "without PyTorch",
        f"load of the machine before: {load}",
    ]


if __name__ == "__main__":  # and not in the processes in which memory is measured
    others = {"against": against.main, "equal": equal.main, "hops": hops.main}
    others.get(sys.argv[1] if len(sys.argv) > 1 else "", main)()
