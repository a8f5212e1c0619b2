"""Leave parameters and examples of slow tests to the nightly profile."""

import pytest
from hypothesis import settings

# For properties of whole networks: 3 examples in dev, 4 in ci, and all 500 at night.
EXAMPLES = settings.default.max_examples
seldom = settings(max_examples=EXAMPLES if EXAMPLES > 25 else max(3, EXAMPLES // 6))


def mostly_slow(values, *quick):
    """Parameters of which all but `quick` are marked slow."""
    return [
        x if x in quick else pytest.param(*(x if type(x) is tuple else [x]), marks=pytest.mark.slow)
        for x in values
    ]
