"""Activations on a GPU, one launch each way; the twins of those in `nn.activations`."""

from tinyldm.backend import Array, array_module
from tinyldm.kernels.cuda.launch import each, each_row, on_gpu
from tinyldm.kernels.registry import kernel
from tinyldm.nn.activations import LEAKY_SLOPE
from tinyldm.nn.protocol import Backward

KINDS = {"silu": 0, "quick_gelu": 1, "gelu": 2, "leaky_relu": 3}  # as in kernels.cu


def _fused(name):
    kind = KINDS[name]

    def fused(x: Array) -> tuple[Array, Backward]:
        xp = array_module(x)
        x, y = xp.ascontiguousarray(x), xp.empty(x.shape, x.dtype)
        each("activation", x.size, x, y, kind, LEAKY_SLOPE)

        def backward(dy):
            dy, dx = xp.ascontiguousarray(dy), xp.empty(x.shape, x.dtype)
            each("activation_backward", x.size, x, dy, dx, kind, LEAKY_SLOPE)
            return dx

        return y, backward

    fused.__name__ = f"fused_{name}"
    return kernel(f"nn.activations.{name}", cost=on_gpu)(fused)


fused_silu, fused_quick_gelu = _fused("silu"), _fused("quick_gelu")
fused_gelu, fused_leaky_relu = _fused("gelu"), _fused("leaky_relu")


@kernel("nn.activations.geglu", cost=on_gpu)
def fused_geglu(x: Array) -> tuple[Array, Backward]:
    """Compute both halves and their product in one launch; Φ(gate) is computed again for dx."""
    xp = array_module(x)
    x, d = xp.ascontiguousarray(x), x.shape[-1] // 2
    y = xp.empty((*x.shape[:-1], d), x.dtype)
    rows = y.size // d
    each_row("geglu", rows, d, x, y, d)

    def backward(dy):
        dx = xp.empty(x.shape, x.dtype)
        each_row("geglu_backward", rows, d, x, xp.ascontiguousarray(dy), dx, d)
        return dx

    return y, backward
