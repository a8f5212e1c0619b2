"""Signals that come before, after and beside the steps of training: nothing is left half-done."""

import signal
import subprocess
import sys

import pytest
from small_run import CONFIG, silent, without_images

from tinyldm import cli
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training import presets
from tinyldm.training.run import resume, whole_run

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    without_images(monkeypatch)
    monkeypatch.setitem(presets.PRESETS, "tiny", CONFIG)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", ["save", "load"])
def test_while_a_model_is_written_or_read(tmp_path, monkeypatch, capsys, number, moment):
    """The exit code says which signal it was, no lock or temporary stays, and resume goes on."""
    run, before = tmp_path / "run", [signal.getsignal(n) for n in SIGNALS]
    kept = getattr(Pipeline, moment)

    def interrupted(*args, **options):
        signal.raise_signal(number)
        return kept(*args, **options)

    words = ["train", "--preset", "tiny", "--out", str(run)]
    if moment == "load":
        assert cli.main(words) == 0
        words = ["sample", str(run), "a circle", "-o", str(tmp_path / "a.png")]
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, moment, interrupted)
        assert cli.main(words) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == "tinyldm: interrupted"
    assert [signal.getsignal(n) for n in SIGNALS] == before
    assert not list(run.rglob(".*"))
    if moment == "save":
        resume(run, say=silent)
    whole_run(str(run), silent)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("number", SIGNALS[1:])
def test_what_is_ignored_stays_ignored(tmp_path, monkeypatch, number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        kept = Pipeline.save
        monkeypatch.setattr(
            Pipeline, "save", lambda *args: signal.raise_signal(number) or kept(*args)
        )
        assert cli.main(["train", "--preset", "tiny", "--out", str(tmp_path / "run")]) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step(tmp_path, number):
    """In a process of its own, as soon as it says anything."""
    command = [sys.executable, "-u", "-m", "tinyldm", "train", "--preset", "demo"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True
    ) as process:
        process.stderr.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("tinyldm: ")
    assert not list(tmp_path.rglob(".*"))
