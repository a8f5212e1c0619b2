"""Every backward pass by every instrument: what the heat map in the README shows."""

import pytest
from slow import mostly_slow

from tests.heat_map import INSTRUMENTS, ROWS, row

# Differences move each parameter of a network by itself.
QUICK = [row for row in ROWS if row[0].startswith(("tinyldm.nn", "tinyldm.kernels"))]


@pytest.mark.parametrize("module, check", mostly_slow(ROWS, *QUICK), ids=map(" ".join, ROWS))
def test_every_gradient_by_every_instrument(module, check):
    found = row(module, check)
    for name, (_, most) in INSTRUMENTS.items():
        assert found[name] is None or found[name] <= most, name
    assert found["complex step"] is not None and found["float32"] is not None
