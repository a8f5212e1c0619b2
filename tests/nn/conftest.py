"""Here the plain functions are tested; tests/kernels compares every kernel with its twin."""

import pytest

from tinyldm.kernels import plain


@pytest.fixture(autouse=True)
def no_kernels():
    with plain():
        yield
