"""Mutants of kernels.cu: faults planted in its source, one at a time. Do the proofs notice?

`python -m tests.cuda_mutants [COUNT] [SEED]` changes one operator, number or name, compiles the
file for the CPU, and compares every kernel with its plain twin. What passes that runs once more
with AddressSanitizer, as a thread that leaves its array may change no result.
"""

import functools
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "support"))

import cuda_on_cpu
import strict
from cuda_calls import examples, far_from_zero, of_twin, plain_twin, results, small, with_barriers
from forks import each, in_fork
from strategies import CUDA_CALLS

from tinyldm.kernels import plain
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.kernels.cuda import adamw, launch, muon
from tinyldm.nn import optim

CHANGES = {  # regular expression → what takes its place
    r" \+ ": [" - "],
    r" - ": [" + "],
    r" \* ": [" / "],
    r" / ": [" * "],
    r" % ": [" / "],
    r" < ": [" <= ", " > "],
    r" <= ": [" < "],
    r" > ": [" >= ", " < "],
    r" \+= ": [" -= ", " = "],
    r" && ": [" || "],
    r"(?<![\w.])0(?![\w.])": ["1"],
    r"(?<![\w.])1(?![\w.])": ["2"],
    r"(?<![\w.])2(?![\w.])": ["3"],
    r"\b0\.5f": ["0.25f"],
    r"\b1\.702f": ["1.7f"],
    r"\b0\.3989422804f": ["0.4f"],
    r"\bthreadIdx\.x\b": ["threadIdx.y"],
    r"\bthreadIdx\.y\b": ["threadIdx.x"],
    r"\bblockIdx\.x\b": ["blockIdx.y"],
    r"\bblockIdx\.y\b": ["blockIdx.x"],
    r"\bgridDim\.x\b": ["gridDim.y"],
    r"\bblockDim\.y\b": ["blockDim.x"],
    r"\bexpf\b": ["logf"],
    r"\bfmaxf\b": ["fminf"],
}
EXPLAINED = {  # (change, line of the source) → why it is no fault
    ("+ → -", "if (threadIdx.x + threadIdx.y == 0) {"):
        "Several threads write the same numbers.",
    ("- → +", "float variance = block_sum(squares, shared) / count - rest * rest;"):
        "What rounding left of the mean, squared, is below every digit of the variance.",
}  # fmt: skip
SECONDS = 60  # for one mutant: one that takes longer is noticed, too
KILLED, SURVIVED = "killed", "survived"


class Mutant(NamedTuple):
    """A change in the source."""

    start: int
    stop: int
    text: str

    def key(self):
        """→ (the change, the line that it is in), as in EXPLAINED."""
        first = SOURCE.rfind("\n", 0, self.start) + 1
        line = SOURCE[first : SOURCE.find("\n", self.start)].strip()
        return f"{SOURCE[self.start : self.stop].strip()} → {self.text.strip()}", line

    def __str__(self):
        change, line = self.key()
        return f"line {SOURCE.count(chr(10), 0, self.start) + 1}: {change} in {line}"


SOURCE = launch.SOURCE.read_text(encoding="utf-8")


def all_mutants():
    """→ every change, comments and constants of the launcher left out."""
    code = re.sub(r"//.*", lambda comment: " " * len(comment[0]), SOURCE)
    code = re.sub(r"#define [A-Z_]+ \d.*", lambda name: " " * len(name[0]), code)
    return [
        Mutant(*found.span(), text)
        for expression, texts in CHANGES.items()
        for found in re.finditer(expression, code)
        for text in texts
    ]


def fate(mutant):
    """→ KILLED or SURVIVED."""
    code = SOURCE[: mutant.start] + mutant.text + SOURCE[mutant.stop :]
    if not in_fork(functools.partial(passes, code), SECONDS):
        return KILLED
    return SURVIVED if in_fork(functools.partial(stays_in_its_arrays, mutant), SECONDS) else KILLED


def passes(code):
    """Compile the source → whether every kernel gives what its twin gives."""
    try:
        module = cuda_on_cpu.RawModule(code)
        launch._function = lambda xp, name: module.get_function(name)
        for cut in (False, True):
            with small(cut), np.errstate(all="ignore"):
                prove()
    except Exception:
        return False
    return True


def prove():
    """Compare all kernels with their twins. AssertionError where they differ."""
    calls = [(plain_twin(twin), call) for twin, name in CUDA_CALLS for call in examples(twin, name)]
    for twin, call in [*calls, *with_barriers(), *far_from_zero()]:
        for x, wanted in zip(results(call), of_twin(twin, call), strict=True):
            if x is not None or wanted is not None:
                np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5)
    prove_update({"matrix": (3, 5), "tiny": (7,)}, adam_steps)
    shapes = {"wide": (3, 5), "tall": (6, 3), "kernel": (2, 1, 2, 3), "alike": (3, 5)}
    prove_update(shapes | {"tiny": (3, 3)}, muon_steps)


def prove_update(shapes, take):
    """Compare buffers on the device with arrays on the host, after steps of an optimizer.

    Gradients of "tiny" are as small as what is added to a divisor.
    """
    rng = np.random.default_rng(0)
    groups = [
        {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(5)
    ]
    for group in groups[1:3]:
        group["tiny"] *= 0
    groups[4]["tiny"] *= np.float32(1e-7)
    device = [Flat({n: strict.asarray(x) for n, x in group.items()}, first=shapes)
              for group in groups]  # fmt: skip
    host = [{n: x.astype("f8") for n, x in group.items()} for group in groups]
    take(*device, adamw.fused_adamw, muon.fused_muon)
    with plain():
        take(*host, optim.adamw, optim.muon)
    for there, here in zip(device, host, strict=True):
        for name, x in here.items():
            np.testing.assert_allclose(there[name].get(), x, rtol=1e-3, atol=1e-4)


def adam_steps(w, m, v, average, grads, adam, _):
    for name in v:
        v[name] *= v[name]
    for step in range(2):
        adam(w, grads, {"m": m, "v": v}, average, step, 0.1, 0.7, decay=0.2, ema=0.9)


def muon_steps(w, m, _, average, grads, __, take):
    for step in range(2):
        take(w, grads, m, average, step, 0.1, 0.7, ema=0.9)


def stays_in_its_arrays(mutant):
    """Run every kernel with AddressSanitizer → whether it has found nothing."""
    find = [cuda_on_cpu.COMPILER, "-print-file-name=libasan.so"]
    library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    changed = SOURCE[: mutant.start] + mutant.text + SOURCE[mutant.stop :]
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": library}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = str(Path(cuda_on_cpu.__file__).with_name("sanitized.py"))
    command = [sys.executable, script, "address", f"{SOURCE}=>{changed}"]
    run = subprocess.run(command, env=environment, capture_output=True)
    return run.returncode == 0


def main():
    chosen, began = all_mutants(), time.monotonic()
    total = len(chosen)
    if len(sys.argv) > 1:
        random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0).shuffle(chosen)
        chosen = chosen[: int(sys.argv[1])]
    if not in_fork(functools.partial(passes, SOURCE), SECONDS):
        raise SystemExit("the proofs fail without a fault")
    survivors = []
    for mutant, one in each(fate, chosen):
        if one == SURVIVED:
            survivors.append(mutant)
            print(f"{one}: {mutant} {EXPLAINED.get(mutant.key(), '')}".rstrip(), flush=True)
    explained = sum(mutant.key() in EXPLAINED for mutant in survivors)
    print(
        f"{len(chosen)} of {total} mutants in {time.monotonic() - began:.0f} s: "
        f"{len(chosen) - len(survivors)} killed, {explained} of the other "
        f"{len(survivors)} explained"
    )


if __name__ == "__main__":
    main()
