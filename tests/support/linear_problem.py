"""The loss of a linear layer and a table, whose gradients tell how a batch was split."""

import numpy as np

from tinyldm.nn import functional as F
from tinyldm.nn.protocol import add_grad


def loss_fn(params, x, target, rows):
    """A linear layer, and a table of which a part of the batch may use no row at all."""
    y, linear_back = F.linear(x, params["w"], params["b"])
    used = rows >= 0
    if used.any():
        y = y + np.where(used[:, None], params["table"][rows], 0)
    loss, loss_back = F.mse(y, target)

    def backward(grads):
        dy, _ = loss_back()
        _, dw, db = linear_back(dy)
        add_grad(grads, "w", dw)
        add_grad(grads, "b", db)
        if used.any():
            dtable = np.zeros_like(params["table"])
            np.add.at(dtable, rows[used], dy[used])
            add_grad(grads, "table", dtable)

    return loss, backward


def problem(seed, n):
    rng = np.random.default_rng(seed)
    params = {
        "w": rng.normal(size=(3, 4)),
        "b": rng.normal(size=3),
        "table": rng.normal(size=(5, 3)),
    }
    return params, (rng.normal(size=(n, 4)), rng.normal(size=(n, 3)), rng.integers(-5, 5, n))


def whole_batch(params, batch):
    loss, backward = loss_fn(params, *batch)
    grads = {}
    backward(grads)
    return loss, grads


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    assert found[1].keys() == expected[1].keys()
    for name, dw in expected[1].items():
        np.testing.assert_allclose(found[1][name], dw, rtol=0, atol=1e-12 * abs(dw).max())
