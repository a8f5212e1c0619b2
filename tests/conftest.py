"""How thoroughly Hypothesis searches, and the count of gradients that were really checked."""

import gc
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: threads slow small products down

from types import SimpleNamespace

import gradients
import pytest
from hypothesis import HealthCheck, Phase, settings

from tinyldm import cli, threads
from tinyldm.nn.protocol import use_kernels

# On a busy machine all is slow: no deadlines.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=10, **COMMON)
# The same examples on every run, and with a failure what it takes to repeat it elsewhere.
settings.register_profile("ci", max_examples=25, derandomize=True, print_blob=True, **COMMON)
# Others every time.
settings.register_profile("nightly", max_examples=500, derandomize=False, print_blob=True, **COMMON)
# For tests/other_mutants.py: that an example fails is enough.
quick = {"phases": [Phase.explicit, Phase.generate], "database": None}
settings.register_profile("mutants", max_examples=10, derandomize=True, **quick, **COMMON)
PROFILE = os.environ.get("TINYLDM_HYPOTHESIS_PROFILE", "dev")
# The option --hypothesis-profile, read later than this, has the last word.
settings.load_profile(PROFILE)
slow = []  # the tests that were left to the nightly profile


@pytest.fixture(autouse=True)
def short_estimate(monkeypatch):
    """Estimate the time of a run from one step of each stage: tests run many short ones."""
    monkeypatch.setattr("tinyldm.training.estimate.CALLS", 1)


@pytest.fixture
def with_kernels(monkeypatch):
    """For tests of kernels: they are in use, whatever TINYLDM_KERNELS says."""
    monkeypatch.delenv("TINYLDM_KERNELS", raising=False)
    monkeypatch.setattr(threads, "_held", [])
    token = use_kernels.set(True)
    yield
    use_kernels.reset(token)


@pytest.fixture
def call(capfd):
    """`call(*arguments) → (exit code, stdout, stderr)`, of this process, even of its C code."""

    def run(*arguments):
        capfd.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return SimpleNamespace(code=code, **capfd.readouterr()._asdict())

    return run


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked slow, except in the nightly profile or with -m."""
    if PROFILE == "nightly" or config.getoption("markexpr"):
        return
    slow.extend(item for item in items if item.get_closest_marker("slow"))
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)


def pytest_collection_finish(session):
    """What is loaded by now stays: to look through it for garbage again and again takes time."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)


def pytest_terminal_summary(terminalreporter):
    tensors, checks = gradients.counts["tensors"], gradients.counts["checks"]
    terminalreporter.write_line(f"gradient cases: {tensors} tensors in {checks} checks")
    if slow:
        terminalreporter.write_line(f"left to the nightly profile: {len(slow)} slow tests")


def pytest_sessionfinish(session, exitstatus):
    """A run of everything that checks no gradient at all is a failure, whatever the dots say."""
    chosen = ("keyword", "markexpr", "collectonly", "deselect", "ignore", "ignore_glob", "lf")
    everything = session.config.args_source is pytest.Config.ArgsSource.TESTPATHS and not any(
        session.config.getoption(option, None) for option in chosen
    )
    if everything and not gradients.counts["checks"] and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
