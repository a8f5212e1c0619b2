"""Products by cuBLAS, and steps as graphs, on the double of CuPy.

A graph of the double does again what was captured, on the memory of then. So whatever was read on
the host, and should have changed since, stays what it was, and the results are wrong.
"""

import os
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
import strict
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_array, seeds

from tinyldm.kernels.cuda import cublas, graph
from tinyldm.kernels.cuda.graph import GraphLeftOut, Graphs

pytestmark = cuda_on_cpu.needs_compiler


def captured(function):
    return Graphs(strict).captured(function)


def there(x):
    return strict.asarray(np.asarray(x, "float32"))


# --------------------------------------------------------------------------------------- products

PLACES = {  # of a matrix among others: whether cuBLAS can take it as it lies, and how it is made
    "row by row": (True, lambda x: x),
    "column by column": (True, lambda x: np.swapaxes(np.swapaxes(x, -1, -2).copy(), -1, -2)),
    "columns of a wider one": (True, lambda x: np.concatenate([x, x], -1)[..., : x.shape[-1]]),
    "rows of a longer one": (True, lambda x: np.concatenate([x, x], -2)[..., : x.shape[-2], :]),
    "every second column": (False, lambda x: np.repeat(x, 2, -1)[..., ::2]),
    "backwards": (False, lambda x: x[..., ::-1].copy()[..., ::-1]),
    "one again and again": (True, lambda x: np.broadcast_to(x[(0,) * (x.ndim - 2)], x.shape)),
}


@given(
    lead=st.lists(st.integers(1, 3), max_size=2), m=st.integers(1, 5), k=st.integers(1, 5),
    n=st.integers(1, 5), a=st.sampled_from(list(PLACES)), b=st.sampled_from(list(PLACES)),
    add=st.booleans(), seed=seeds,
)  # fmt: skip
def test_products_of_matrices_as_they_lie(lead, m, k, n, a, b, add, seed):
    rng = np.random.default_rng(seed)
    x, y = (random_array(rng, (*lead, *shape), "float32") for shape in ((m, k), (k, n)))
    x, y = PLACES[a][1](x), PLACES[b][1](y)
    out = random_array(rng, (*lead, m, n), "float32")
    expected = x.astype("f8") @ y.astype("f8") + add * out
    x_there, y_there, out_there = strict.ndarray(x), strict.ndarray(y), strict.ndarray(out.copy())
    with strict.counting() as counts:
        result = cublas.product(x_there, y_there, out_there, add)
    assert result is out_there
    np.testing.assert_allclose(result.get(), expected, rtol=1e-5, atol=1e-5)
    if PLACES[a][0] and PLACES[b][0]:
        assert counts.launches == 1
    if not add:
        np.testing.assert_array_equal(cublas.product(x_there, y_there).get(), result.get())


def test_a_product_of_nothing():
    x = cublas.product(there(np.ones((0, 3))), there(np.ones((3, 2))))
    assert x.shape == (0, 2)


def test_an_error_of_cublas_is_an_error():
    with pytest.raises(RuntimeError, match="cuBLAS: status 7"):
        cublas._check(7)


# ----------------------------------------------------------------------------------------- graphs


def test_a_graph_does_the_same_with_other_numbers():
    weights, calls = there([1.0, 2.0]), []

    def function(x, y):
        calls.append(None)
        product = cublas.product(x, y)
        product *= weights
        return product.sum(axis=0), {"product": strict.exp(-product)}

    graphed = captured(function)
    for i in range(6):
        rng = np.random.default_rng(i)
        x, y = there(rng.normal(size=(3, 4))), there(rng.normal(size=(4, 2)))
        weights *= 1.5  # in its place
        expected = function(x, y)
        with strict.counting() as counts:
            total, named = graphed(x, y)
        np.testing.assert_array_equal(total.get(), expected[0].get())
        np.testing.assert_array_equal(named["product"].get(), expected[1]["product"].get())
        assert counts.uploads == 0
        if i > graph.WARM:
            assert counts.launches == 3 and counts.synchronisations == 0  # two inputs, the graph
    assert len(calls) == 6 + graph.WARM + 1
    x = there(np.ones((1, 4)))  # another shape: another graph
    np.testing.assert_array_equal(graphed(x, y)[0].get(), function(x, y)[0].get())


def test_what_is_read_on_the_host_does_not_change_any_more():
    """So the other tests would notice."""
    factor = 1.0
    graphed = captured(lambda x: x * factor)
    for i in range(5):
        factor = float(i)
        result = graphed(there([1.0])).tolist()
    assert result == [graph.WARM]


@pytest.mark.parametrize(
    "what, function",
    [
        ("a copy from the host", lambda x: x + strict.asarray(np.ones(2, "f4"))),
        ("a wait for the device", lambda x: x + float(x[0])),
        ("CuPy calls cuBLAS", lambda x: x * (x[None] @ x[:, None])[0]),
        ("pointers to many arrays", lambda x: strict.concatenate([x] * 9)),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is_and_says_so(what, function):
    graphed = captured(function)
    for i in range(graph.WARM):
        graphed(there([1.0, i]))
    with pytest.warns(GraphLeftOut, match=f"no graph, kernel by kernel: {what}.*, while a graph"):
        graphed(there([1.0, 2.0]))
    for i in range(3):  # and not again
        x = there([1.0, i])
        np.testing.assert_array_equal(graphed(x).get(), function(x).get())


def test_memory_that_is_short_while_a_graph_is_captured_leaves_it_out():
    short = []

    def function(x):
        if short:
            raise MemoryError(short.pop())
        return x + 1

    graphed = captured(function)
    for _ in range(graph.WARM):
        graphed(there([1.0]))
    short.append("out of memory")
    with pytest.warns(GraphLeftOut, match="no graph, kernel by kernel: out of memory"):
        assert graphed(there([1.0])).tolist() == [2.0]


def test_graphs_give_their_memory_back():
    with graph._graphs(strict) as graphs:
        step = graphs.captured(lambda x: x * 2)
        for i in range(4):
            assert step(there([i])).tolist() == [2 * i]
        assert graphs.steps[0].graph is not None and graphs.pool.freed == 0
    assert graphs.steps[0].graph is graphs.steps[0].result is None and graphs.pool.freed == 1


def test_real_numbers_that_are_not_float32_are_not_captured():
    calls = []
    function = captured(lambda x: calls.append(None) or x + 1)
    for _ in range(5):
        function(strict.asarray(np.ones(2)))
    assert len(calls) == 5


@pytest.mark.slow
def test_the_tests_for_a_gpu_pass_on_the_double():
    """So a failure on a GPU is one of the GPU's."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_on_the_double", "tests/test_gpu.py"]
    settings = {
        "PYTHONPATH": str(root / "tests" / "support"),
        "TINYLDM_HYPOTHESIS_PROFILE": "mutants",
    }
    run = subprocess.run(
        command, cwd=root, env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout
