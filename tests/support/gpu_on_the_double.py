"""A plugin that puts the double of CuPy in its place, so that the tests for a GPU run without one.

PYTHONPATH=tests/support python -m pytest -p gpu_on_the_double tests/test_gpu.py
"""


def pytest_configure():
    import strict

    from tinyldm import backend

    backend._cupy = lambda device: strict
    backend.SPECIAL_FUNCTIONS["strict"] = "strict"
