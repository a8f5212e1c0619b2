"""What the quick suite takes less of, and the nightly profile all."""

import pytest
from hypothesis import settings

# For properties of whole networks: 5 examples in ci, 100 at night.
seldom = settings(max_examples=max(5, settings.default.max_examples // 5))


def mostly_slow(values, *quick):
    """Parameters of which all but `quick` are marked slow."""
    return [
        x if x in quick else pytest.param(*(x if type(x) is tuple else [x]), marks=pytest.mark.slow)
        for x in values
    ]
