"""A run that is stopped again and again, at any moment and by any signal, is the run that was not.

In processes of their own, as a user would see it; how many stops there are grows with the profile
of Hypothesis (nightly: 60).
"""

import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import settings

from tinyldm.checkpoints.components import COMPONENTS
from tinyldm.training.presets import PRESETS
from tinyldm.training.run import train
from tinyldm.training.state import state_files

STOPS = {"ci": 6, "nightly": 60}.get(settings.get_current_profile_name(), 3)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    train(run, PRESETS["tiny"], say=lambda line: None)
    return run


def results(run):
    """The last state and all that is exported from it; older states are where the stops were."""
    folders = [run / name for name in (*COMPONENTS, "scheduler", "tokenizer")]
    files = [file for folder in folders for file in folder.iterdir()]
    files += [run / "model_index.json", state_files(run)[-1]]
    return {file.relative_to(run): file.read_bytes() for file in files}


@pytest.mark.slow
def test_stopped_at_random_moments_the_results_are_the_same(tmp_path, undisturbed):
    expected = results(undisturbed)
    seed = random.randrange(2**32)
    rng, stops, runs = random.Random(seed), [], 0
    run = tmp_path / "0"
    while len(stops) < STOPS or runs == 0 or run.exists():
        command = ["train", "--preset", "tiny", "--out", run] + ["--resume"] * bool(
            state_files(run)
        )
        with subprocess.Popen(
            [sys.executable, "-m", "tinyldm", *map(str, command)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            if len(stops) < STOPS:
                process.stderr.readline()  # the moments are counted from its first line
                time.sleep(rng.uniform(0, 2.5))
                if process.poll() is None:
                    stops.append(rng.choice(SIGNALS))
                    process.send_signal(stops[-1])
            _, said = process.communicate(timeout=300)
        code = process.returncode
        if code == 0:
            assert results(run) == expected, f"seed {seed}, stops {stops}"
            runs += 1
            run = tmp_path / str(runs)
        else:
            last = stops[-1]
            assert code in (128 + last, -last), f"seed {seed}, {stops}: {said}"
    assert runs > 0
