"""Kernels for a GPU, in CUDA: kernels.cu, and a file for each group of functions that call it."""

from tinyldm.kernels.cuda import (  # noqa: F401
    activations,
    adamw,
    attention,
    conv,
    embedding,
    graph,
    linear,
    muon,
    norms,
)
