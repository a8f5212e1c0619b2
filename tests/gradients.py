"""Gradient checks that are counted, so that a suite which checks nothing cannot pass unseen."""

from collections import Counter

from tinyldm.nn.gradcheck import check_gradients

counts = Counter()  # of "checks" and of the "tensors" in them; conftest.py prints it


def check(f, inputs, params=None, **options):
    """`check_gradients`, which raises for a wrong gradient; a check of nothing is wrong too."""
    tensors = check_gradients(f, inputs, params, **options)
    assert tensors > 0
    counts["tensors"] += tensors
    counts["checks"] += 1


def of_loss(loss_fn, *batch):
    """The loss of a batch, whose backward pass takes `grads` alone, as a function to check."""

    def f(params):
        loss, loss_back = loss_fn(params, *batch)

        def backward(dloss, grads):
            found = {}
            loss_back(found)
            grads |= {name: dloss * dw for name, dw in found.items()}

        return loss, backward

    return f
