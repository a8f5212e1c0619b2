"""This tree beside another checkout of it: is anything slower than it was?

    python -m bench against ../other-checkout [CASE …] [--tiny] [--rounds N]

Each tree runs the cases of its own `bench` in a process of its own; rounds alternate between both.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SECONDS = 0.3  # of one measurement, at least


def cases(tiny: bool) -> Iterator[tuple[str, Callable[[], Callable]]]:
    """Yield (name, a function that prepares the step to be timed) of every case of this tree."""
    from bench import ops, sample, sd, train

    sizes = (2, 4, 32) if tiny else (16, 16, 256)
    for i, function in enumerate(ops.functions(*sizes)):
        yield function.name, lambda i=i: ops.function_at(i, *sizes).step(backward=True)[1]
    preset, images = ("tiny", (2, 1)) if tiny else ("demo", (16, 1))
    steps = [sample.SamplingStep(preset, n) for n in images]
    networks = [train.TINY, steps, sd.TINY] if tiny else [train.CASES, steps, sd.CASES]
    for case in itertools.chain(*networks):
        yield case.name, lambda case=case: case.ours(case.params(), "cpu")


def seconds(step: Callable, repeats: int) -> float:
    """Return the seconds of a call, of many in a row."""
    if hasattr(step, "seconds"):  # shared by processes, which meet before and after
        return step.seconds(repeats)
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - started) / repeats


def serve() -> None:
    """Answer each line on stdin: a case's number prepares it, a number of repeats times it."""
    from bench.measure import leave
    from tinyldm.machine import keep_freed_memory

    keep_freed_memory()
    prepared = list(cases("--tiny" in sys.argv))
    print(json.dumps([name for name, _ in prepared]), flush=True)
    step = None
    for line in sys.stdin:
        kind, number = line.split()
        if kind == "prepare":
            leave()
            step = prepared[int(number)][1]()
            step(), step()
            print(json.dumps(seconds(step, 1)), flush=True)
        else:
            print(json.dumps(seconds(step, int(number))), flush=True)


class Tree:
    """A checkout whose cases run in a process of its own."""

    def __init__(self, root: Path, options: list[str]):
        environment = os.environ | {"PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "bench" / "against.py"), "--serve", *options],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.names = self.answer()

    def answer(self) -> object:
        """Return what the process says next. SystemExit where it has failed."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the process of one of the trees has failed, see above")
        return json.loads(line)

    def ask(self, kind: str, number: int) -> float:
        """Return the seconds of a call."""
        self.process.stdin.write(f"{kind} {number}\n")
        self.process.stdin.flush()
        return self.answer()


def main() -> None:
    """Print a table: other tree's time / this tree's time, with its quartiles."""
    import numpy as np

    parser = argparse.ArgumentParser(prog="python -m bench against", description=__doc__)
    parser.add_argument("tree", type=Path, help="folder of the other checkout")
    parser.add_argument("cases", nargs="*", help="parts of the names of cases; none: all")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each (default: 15)")
    parser.add_argument("--tiny", action="store_true", help="small sizes: does it still run?")
    options = parser.parse_args(sys.argv[2:])
    trees = [Tree(root.resolve(), ["--tiny"] * options.tiny) for root in (HERE, options.tree)]
    print("| case | ms | other / this | its quartiles | other / other |\n|---|---|---|---|---|")
    for i, name in enumerate(trees[0].names):
        if options.cases and not any(part in name for part in options.cases):
            continue
        once = max(tree.ask("prepare", i) for tree in trees)
        repeats = max(1, round(SECONDS / once))
        rounds = 3 if options.tiny else min(options.rounds, 9) if once > 3 else options.rounds
        time_both = [partial(tree.ask, "time", repeats) for tree in trees]
        times = np.array([[measure() for measure in time_both] for _ in range(rounds)])
        ratios = times[:, 1] / times[:, 0]
        spread = times[:, 1] / np.median(times[:, 1])  # of the other tree alone
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        own_low, own_high = np.percentile(spread, (25, 75))
        print(
            f"| {name} | {1e3 * np.median(times[:, 0]):.3g} | {middle:.3f} | {low:.3f}–{high:.3f} "
            f"| {own_low:.3f}–{own_high:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
