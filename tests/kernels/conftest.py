"""These test the kernels themselves, so they run with kernels whatever TINYLDM_KERNELS says."""

import pytest

from tinyldm import threads
from tinyldm.nn.protocol import use_kernels


@pytest.fixture(autouse=True)
def kernels_in_use(monkeypatch):
    monkeypatch.delenv("TINYLDM_KERNELS", raising=False)
    monkeypatch.setattr(threads, "_held", [])
    token = use_kernels.set(True)
    yield
    use_kernels.reset(token)
