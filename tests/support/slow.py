"""What the quick suite takes less of, and the nightly profile all."""

import pytest
from hypothesis import settings

# For properties of whole networks: 4 examples in ci, 83 at night.
seldom = settings(max_examples=max(3, settings.default.max_examples // 6))


def mostly_slow(values, *quick):
    """Parameters of which all but `quick` are marked slow."""
    return [
        x if x in quick else pytest.param(*(x if type(x) is tuple else [x]), marks=pytest.mark.slow)
        for x in values
    ]
