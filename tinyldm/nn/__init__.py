"""Hand-written layers: every forward pass with its backward pass under it."""

from tinyldm.nn.protocol import Grads, no_grad, recompute

__all__ = ["Grads", "no_grad", "recompute"]
