"""Gradient checks that are counted, so that a suite which checks nothing cannot pass unseen."""

import contextlib
import math
from collections import Counter

from hypothesis import currently_in_test_context, target
from hypothesis.errors import InvalidArgument

from tinyldm.backend import array_module
from tinyldm.nn.protocol import add_grad
from tinyldm.testing import check_gradients
from tinyldm.training.adversarial import OF_ADVERSARIAL, OF_ERROR

counts = Counter()  # of "checks" and of the "tensors" in them; conftest.py prints it


def check(f, inputs, params=None, **options):
    """`check_gradients`, which raises for a wrong gradient; a check of nothing is wrong too.

    Hypothesis searches for the inputs at which the mismatch is largest.
    """
    mismatches = check_gradients(f, inputs, params, **{"tol": 1e-11} | options)
    assert mismatches
    counts["tensors"] += len(mismatches)
    counts["checks"] += 1
    if not currently_in_test_context():
        return
    with contextlib.suppress(InvalidArgument):  # the second check of one example
        target(math.log10(max(mismatches.values()) + 1e-20), label="mismatch")


def check_loss(loss_fn, params, frozen, batch, **options):
    """The gradients of `params` that a loss of training gives; of `frozen` there must be none.

    Its backward pass takes `grads` alone, and may leave numbers there that are no parameter's.
    """

    def call(moved):
        loss, loss_back = loss_fn(frozen | moved, *batch)

        def backward(dloss, grads):
            found = {}
            loss_back(found)
            for name in (OF_ERROR, OF_ADVERSARIAL):
                found.pop(name, None)
            for name, dw in found.items():
                add_grad(grads, name, dloss * dw)
            return ()

        return loss, backward

    check(call, (), params, **options)


def joined(f):
    """A layer that returns a list of arrays, as one that returns a single array for the check."""

    def call(params, *inputs):
        ys, backward = f(params, *inputs)
        ends = [0]
        for y in ys:
            ends.append(ends[-1] + y.size)

        def back(dy, grads):
            parts = zip(ys, ends, ends[1:], strict=False)
            return backward([dy[a:b].reshape(y.shape) for y, a, b in parts], grads)

        return array_module(ys[0]).concatenate([y.reshape(-1) for y in ys]), back

    return call
