"""Are the gradient checks worth anything? Faults planted in every backward pass are noticed."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from backward_checks import MODULES
from slow import mostly_slow

from tests.mutants import EXPLAINED, SURVIVED, all_mutants, run

ROOT = Path(__file__).parents[2]
SAMPLE = 4  # mutants of a module in the quick suite


def test_there_are_hundreds():
    assert sum(len(all_mutants(module)) for module in MODULES) >= 1000


@pytest.mark.parametrize("count", mostly_slow([SAMPLE, None], SAMPLE))
def test_mutants_are_noticed(count):
    chosen = []
    for module in MODULES:
        of_module = all_mutants(module)
        random.Random(0).shuffle(of_module)
        chosen += of_module[:count]
    survivors = run(chosen, say=lambda line: None)[SURVIVED]
    assert [str(mutant) for mutant in survivors if mutant.key() not in EXPLAINED] == []


@pytest.mark.slow
def test_other_mutants_are_noticed():
    command = [sys.executable, "-m", "tests.other_mutants", "20", "0"]
    command += ["diffusion/guidance", "diffusion/loss", "nn/optim"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "killed of the others: 100.0%" in done.stdout, done.stdout
