"""pytest's fixture `gradients`, which is there wherever tinyldm is installed, and off unless used.

    def test_my_layer(gradients):
        gradients(my_layer, x, params)

It is `check_gradients`, with the seed that `pytest --gradcheck-seed N` gives. How many tensors were
checked is printed at the end: a suite which checks nothing does not look like one that does. pytest
imports this file in every run, so it imports nothing itself; NumPy's threads are set after it.
"""

from collections import Counter
from collections.abc import Callable

import pytest

COUNTS = pytest.StashKey[Counter]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --gradcheck-seed."""
    parser.getgroup("tinyldm").addoption(
        "--gradcheck-seed", type=int, default=0, metavar="N",
        help="seed of the random directions of the fixture `gradients` (0)",
    )  # fmt: skip


@pytest.fixture(scope="session")
def gradients(pytestconfig: pytest.Config) -> Callable[..., dict[str, float]]:
    """Check gradients as `tinyldm.testing.check_gradients` does, and count the checks."""
    from tinyldm.testing import check_gradients

    counts = pytestconfig.stash.setdefault(COUNTS, Counter())
    seed = pytestconfig.getoption("gradcheck_seed")

    def check(*args, **options):
        __tracebackhide__ = True
        mismatches = check_gradients(*args, **{"rng": seed} | options)
        counts.update(checks=1, tensors=len(mismatches))
        return mismatches

    return check


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print how many tensors were right in how many checks."""
    if COUNTS in config.stash:
        counts, seed = config.stash[COUNTS], config.getoption("gradcheck_seed")
        found = f"tensors right: {counts['tensors']}, checks that passed: {counts['checks']}"
        terminalreporter.write_line(f"gradients: {found}; seed {seed}")
