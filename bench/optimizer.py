"""The other half of a train step: the gradient clipped, AdamW, and the average of the weights."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from bench.compare import relative
from bench.measure import Limits, Step
from bench.nets import Params, random_params, unet_config
from tinyldm.backend import to_device
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.models import UNet
from tinyldm.nn.optim import (
    BETA1,
    BETA2,
    EPSILON,
    adam_state,
    adamw,
    clip_factor,
    ema_decay,
    global_norm,
)

RATE = 1e-2  # large, so that an error in the update is not small beside the weight
DECAY, AVERAGE, MAX_NORM = 0.01, 0.999, 1.0
PASSES = 10  # over all numbers: five are read and four written, and the norm reads the gradient


@dataclass(frozen=True)
class OptimizerStep:
    """One update of the parameters of a U-Net of these widths."""

    widths: tuple[int, ...]

    layouts = ("contiguous",)  # any would do

    def _shapes(self):
        return UNet(unet_config(self.widths, layers=1, side=16, d=64)).shapes()

    def _count(self):
        return sum(map(math.prod, self._shapes().values()))

    def _grads_and_average(self):
        """Random too: other numbers, so that no mistake of one for the other can hide."""
        return [random_params(self._shapes(), seed) for seed in (1, 2)]

    @property
    def name(self) -> str:
        """As in the table."""
        return f"clip, AdamW, average of {self._count() / 1e6:.1f} M parameters"

    def params(self) -> Params:
        """Random ones."""
        return random_params(self._shapes())

    def ours(self, params: Params, device: str) -> Step:
        """→ parameters, their average."""
        grads, average = (to_device(x, device) for x in self._grads_and_average())
        params, average = Flat(to_device(params, device)), Flat(average)
        moments = {moment: Flat(zeros) for moment, zeros in adam_state(params).items()}
        count = itertools.count()

        def step():
            scale = clip_factor(global_norm(grads), MAX_NORM)
            adamw(params, grads, moments, average, next(count), RATE, scale, DECAY, AVERAGE)
            return params, average

        return step

    def theirs(self, params: Params, layout: str, device: str) -> Step:
        """The same, all tensors at a time: PyTorch's foreach."""
        import torch

        leaves, grads, average = (
            {name: torch.from_numpy(w).to(device, copy=True) for name, w in named.items()}
            for named in (params, *self._grads_and_average())
        )
        for name, w in leaves.items():
            w.grad = grads[name]
        groups = [
            {"params": [w for w in leaves.values() if w.ndim > 1], "weight_decay": DECAY},
            {"params": [w for w in leaves.values() if w.ndim == 1], "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(groups, RATE, (BETA1, BETA2), EPSILON, foreach=True)
        count = itertools.count()

        def step():
            torch.nn.utils.clip_grad_norm_(leaves.values(), MAX_NORM, foreach=True)
            adam.step()
            keep = ema_decay(next(count), AVERAGE)
            torch._foreach_lerp_(list(average.values()), list(leaves.values()), 1 - keep)
            return leaves, average

        return step

    def difference(self, ours: tuple, theirs: tuple) -> float:
        """The larger of the weights' and of their average's, each as one long vector."""
        from bench.peer import to_arrays

        return max(
            relative(
                np.concatenate([to_device(w, "cpu").ravel() for w in own.values()]),
                np.concatenate([to_arrays(w).ravel() for w in other.values()]),
            )
            for own, other in zip(ours, theirs, strict=True)
        )

    def least_seconds(self, limits: Limits, theirs: Step | None) -> float:
        """There is hardly any arithmetic: the limit is that of memory."""
        return PASSES * 4 * self._count() / limits.bandwidth
