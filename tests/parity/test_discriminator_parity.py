"""The patch discriminator against the same layers of torch, outputs and every gradient."""

import peers
import pytest
import torch
from model_cases import numbers, random_params

from tinyldm.models.discriminator import EPS, PatchDiscriminator


def theirs(model, params, x, dy):
    leaves = {n: peers.weight_to_torch(w).contiguous().requires_grad_() for n, w in params.items()}
    x = peers.pixels_to_torch(x)
    h = x
    for i, conv in enumerate(model.convs):
        stride, _ = conv.options
        weights = (leaves[name] for name in conv.weights)
        h = torch.nn.functional.conv2d(h, *weights, stride=stride, padding=1)
        if conv is model.convs[-1]:
            break
        if i > 0:
            norm = model.norms[i - 1]
            groups, weights = norm.options[0], (leaves[name] for name in norm.weights)
            h = torch.nn.functional.group_norm(h, groups, *weights, EPS)
        h = torch.nn.functional.leaky_relu(h, 0.2)
    h.backward(peers.pixels_to_torch(dy))
    grads = {name: peers.weight_to_numpy(leaf.grad) for name, leaf in leaves.items()}
    return peers.pixels_to_numpy(h), grads | {"x": peers.pixels_to_numpy(x.grad)}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("h, w", [(32, 32), (32, 41)])
def test_outputs_and_gradients(layers, h, w):
    model = PatchDiscriminator("d", 3, 4, groups=2, layers=layers)
    params, x = random_params(model.shapes()), numbers("x", 2, h, w, 3)
    logits, backward = model(params, x)
    dy, grads = numbers("dy", *logits.shape), {}
    grads["x"] = backward(dy, grads)
    peers.assert_same("discriminator", (logits, grads), theirs(model, params, x, dy))
