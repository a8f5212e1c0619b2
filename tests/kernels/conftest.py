"""These test the kernels themselves."""

import pytest


@pytest.fixture(autouse=True)
def kernels_in_use(with_kernels):
    pass
