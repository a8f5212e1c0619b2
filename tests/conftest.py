"""How thoroughly Hypothesis searches, and the count of gradients that were really checked."""

import os

import gradients
import pytest
from hypothesis import settings

# The same examples on every run, with what it takes to repeat a failure elsewhere.
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("dev", max_examples=10, deadline=None)
settings.register_profile("nightly", max_examples=500, deadline=None, print_blob=True)
# The option --hypothesis-profile, read later than this, has the last word.
settings.load_profile(os.environ.get("TINYLDM_HYPOTHESIS_PROFILE", "dev"))


def pytest_terminal_summary(terminalreporter):
    tensors, checks = gradients.counts["tensors"], gradients.counts["checks"]
    terminalreporter.write_line(f"gradient cases: {tensors} tensors in {checks} checks")


def pytest_sessionfinish(session, exitstatus):
    """A run of everything that checks no gradient at all is a failure, whatever the dots say."""
    option = session.config.option
    everything = session.config.args_source is pytest.Config.ArgsSource.TESTPATHS
    selected = option.keyword or option.markexpr or option.collectonly
    if everything and not selected and not gradients.counts["checks"] and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
