"""AdamW, clipping and the norm against torch, in float64."""

import numpy as np
import pytest
import torch

from tinyldm.kernels.cpu.flat import Flat
from tinyldm.nn.optim import (
    ITERATIONS,
    MOMENTUM,
    QUINTIC,
    adam_state,
    adamw,
    clip_factor,
    global_norm,
    learning_rate,
    muon,
)

SHAPES = {"matrix": (4, 5), "kernel": (3, 3, 2, 4), "bias": (6,), "scale": (1,)}
# What torch adds to a norm before it divides by it, so as to never divide by zero. Ours is 1e-12,
# which keeps the norm after clipping at the limit to the last digits.
TORCH_MARGIN = 1e-6


@pytest.mark.parametrize("limit", [1e-3, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.5])
def test_ten_steps_are_those_of_torch(decay, limit):
    rng = np.random.default_rng(0)
    params = Flat({name: rng.normal(size=shape) for name, shape in SHAPES.items()})
    theirs = {name: torch.nn.Parameter(torch.tensor(w)) for name, w in params.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.values() if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in theirs.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    state, average = adam_state(params), params.copy()
    for step in range(10):
        rate = learning_rate(step, 10, 1e-2, 3)
        grads = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        for group in optimizer.param_groups:
            group["lr"] = rate
        their_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), limit)
        optimizer.step()

        norm = global_norm(grads)
        np.testing.assert_allclose(norm, their_norm.item(), rtol=1e-14)
        np.testing.assert_allclose(
            clip_factor(norm, limit), min(1, limit / norm), rtol=2e-12 / norm
        )
        scale = clip_factor(norm + TORCH_MARGIN, limit)
        for name, p in theirs.items():
            np.testing.assert_allclose(scale * grads[name], p.grad, rtol=1e-12)
        adamw(params, grads, state, average, step, rate, scale=scale, decay=decay)
        for name, p in theirs.items():
            ours = [params[name], state["m"][name], state["v"][name]]
            moments = optimizer.state[p]
            expected = [p.detach(), moments["exp_avg"], moments["exp_avg_sq"]]
            for a, b in zip(ours, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * abs(b).max().item())


def test_muon_is_that_of_torch(monkeypatch):
    """Torch orthogonalises in bfloat16; here it is held to float64."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    rng = np.random.default_rng(0)
    shapes = {"wide": (8, 20), "tall": (30, 6), "square": (16, 16)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(w)) for name, w in params.items()}
    optimizer = torch.optim.Muon(
        theirs.values(), lr=0.02, weight_decay=0.0, momentum=MOMENTUM, nesterov=True,
        ns_coefficients=QUINTIC, ns_steps=ITERATIONS, adjust_lr_fn="original",
    )  # fmt: skip
    momentum = {name: np.zeros_like(w) for name, w in params.items()}
    average = {name: w.copy() for name, w in params.items()}
    for step in range(5):
        grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        optimizer.step()
        muon(params, grads, momentum, average, step, 0.02)
        for name, p in theirs.items():
            np.testing.assert_allclose(params[name], p.detach(), atol=1e-8, err_msg=name)
            buffer = optimizer.state[p]["momentum_buffer"]
            np.testing.assert_allclose(momentum[name], buffer, rtol=1e-12)
