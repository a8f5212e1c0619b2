"""PyTorch and diffusers, with our weights and our arrays. Importing this file needs both."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "AutoencoderKL",
    "DDIMScheduler",
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
    "functional",
]

FORMATS = {  # how images and kernels lie in memory
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
IMAGE, KERNEL = (
    (0, 2, 3, 1),
    (2, 3, 1, 0),
)  # our order of the axes, of (n, c, h, w) and (k, c, h, w)


def describe_device() -> str:
    """Describe version and threads."""
    return f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"


def sgemm(seconds: float = 1.0) -> float:
    """Measure the rate of a matrix product on the CPU for so many seconds, in GF/s."""
    a = torch.ones(1024, 1024)
    end, best = time.perf_counter() + seconds, math.inf
    while time.perf_counter() < end:
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * len(a) ** 3 / best / 1e9


def prepare_gpu() -> bool:
    """Whether there is one. PyTorch then uses it at its best, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # tries what is fastest for each shape
    return torch.cuda.is_available()


def load(
    model: type, config: dict, params: dict[str, np.ndarray], layout: str, device: str
) -> torch.nn.Module:
    """A model of diffusers; on the CPU it shares our weights, except for kernels."""
    with torch.device("meta"):  # without memory of its own
        loaded = model(**config)
    weights = {name: tensor(w, layout, axes=KERNEL) for name, w in params.items()}
    loaded.load_state_dict(weights, assign=True)
    return loaded.to(device)


def tensor(
    x: np.ndarray, layout: str, device: str = "cpu", axes: tuple[int, ...] = IMAGE
) -> torch.Tensor:
    """One of our arrays. axes: what its four axes are, if it has as many, IMAGE or KERNEL."""
    if x.ndim < 4:
        return torch.from_numpy(x).to(device)
    x = torch.from_numpy(x.transpose(np.argsort(axes)))
    return x.contiguous(memory_format=FORMATS[layout]).to(device)


def to_arrays(result: Any) -> Any:
    """All tensors in dicts and tuples as arrays, in PyTorch's order of axes."""
    if isinstance(result, dict):
        return {name: to_arrays(x) for name, x in result.items()}
    if isinstance(result, (tuple, list)):
        return tuple(map(to_arrays, result))
    return result.detach().cpu().numpy() if isinstance(result, torch.Tensor) else result


def to_numpy(x: torch.Tensor | np.ndarray, axes: tuple[int, ...] = IMAGE) -> np.ndarray:
    """A tensor, or such an array, in our order of axes."""
    x = to_arrays(x)
    return x if x.ndim < 4 else x.transpose(axes)


def train_step(model: torch.nn.Module, loss_fn: Callable[[], torch.Tensor]) -> Callable:
    """→ a function that returns the loss and {name: gradient}."""

    def step():
        model.zero_grad(set_to_none=True)
        loss = loss_fn()
        loss.backward()
        return loss, {name: parameter.grad for name, parameter in model.named_parameters()}

    return step


def without_grad(function: Callable[[], Any]) -> Callable[[], Any]:
    """The same function in inference mode."""
    return torch.inference_mode()(function)


def forward_backward(
    function: Callable, inputs: Sequence[torch.Tensor], dy: torch.Tensor
) -> Callable:
    """→ a function that returns `function(*inputs)` and the gradients of all inputs."""
    leaves = [x.requires_grad_() for x in inputs]

    def step():
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    return step


def flops(step: Callable) -> int:
    """Multiplications and additions of a step's matrix products and direct convolutions."""
    # The counter knows the products inside of attention only where they are called one by one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
