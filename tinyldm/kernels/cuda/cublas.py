"""Matrix products by cuBLAS, of matrices as they lie.

CuPy calls cuBLAS, too. But it copies each matrix of a batch that is transposed or has gaps, and
refuses products while a graph is captured. So the library is called here without it.
"""

import ctypes
import functools
import importlib
import math
from types import ModuleType
from typing import NamedTuple

from tinyldm.backend import Array, array_module

WORKSPACE = 2**25  # bytes, as NVIDIA recommends for Hopper
FLOAT32, COMPUTE_32F, DEFAULT_ALGORITHM = 0, 68, -1  # names of cuBLAS for what is computed, and how


def product(a: Array, b: Array, out: Array | None = None, add: bool = False) -> Array:
    """Multiply float32 matrices a (..., m, k) by b (..., k, n) → (..., m, n), into `out`.

    a and b have equal leading axes, and may be transposed. Copies are made only of what cuBLAS
    cannot take as it lies. add: the product is added to `out`, which lies row by row.
    """
    if out is None:
        out = array_module(a).empty((*a.shape[:-1], b.shape[-1]), a.dtype)
    if not out.size:
        return out
    described = describe(a, b, out)
    if described is None:
        a, b = map(array_module(a).ascontiguousarray, (a, b))
        described = describe(a, b, out)
    xp = array_module(a)
    _cublas(xp, xp.cuda.runtime.getDevice()).gemm(described, a, b, out, add)
    return out


class Gemm(NamedTuple):
    """Arguments of cublasGemmStridedBatchedEx besides pointers and types, for out = a b.

    cuBLAS reads matrices column by column. What lies row by row is there its transpose, and
    out = a b is outᵀ = bᵀ aᵀ: so b comes first. A leading dimension is the numbers from one row (or
    column) to the next, a stride those from one matrix to the next.
    """

    transpose_b: bool
    transpose_a: bool
    n: int
    m: int
    k: int
    leading_b: int
    stride_b: int
    leading_a: int
    stride_a: int
    leading_out: int
    stride_out: int
    count: int


def describe(a: Array, b: Array, out: Array) -> Gemm | None:
    """Describe a product to cuBLAS; None where one of its calls cannot do it."""
    lead = out.shape[:-2]
    layouts = [_layout(x) for x in (b, a, out)]
    strides = [_stride(x, lead) for x in (b, a, out)]
    if None in layouts or None in strides or layouts[2][0]:
        return None
    (turned_b, leading_b), (turned_a, leading_a), (_, leading_out) = layouts
    m, k, n = *a.shape[-2:], b.shape[-1]
    return Gemm(
        turned_b, turned_a, n, m, k, leading_b, strides[0], leading_a, strides[1], leading_out,
        strides[2], math.prod(lead),
    )  # fmt: skip


def _layout(x):
    """→ (does it lie column by column, its leading dimension), or None with other gaps."""
    rows, columns = x.shape[-2:]
    down, across = (stride // x.itemsize for stride in x.strides[-2:])
    if (across == 1 or columns == 1) and (rows == 1 or down >= columns):
        return False, down if rows > 1 else columns
    if (down == 1 or rows == 1) and (columns == 1 or across >= rows):
        return True, across if columns > 1 else rows
    return None


def _stride(x, lead):
    """→ numbers from one matrix of a batch to the next; None where they differ."""
    axes = [(n, s // x.itemsize) for n, s in zip(lead, x.strides[:-2], strict=True) if n > 1]
    if any(outer != n * inner for (_, outer), (n, inner) in zip(axes, axes[1:], strict=False)):
        return None
    return axes[-1][1] if axes else 0


@functools.cache
def _cublas(xp, device):
    return Cublas(xp)


class Cublas:
    """The library, with a handle and a workspace of its own on the current device."""

    def __init__(self, xp: ModuleType):
        self.xp, self.library, self.stream = xp, load(xp), None
        self.handle, self.workspace = ctypes.c_void_p(), xp.cuda.alloc(WORKSPACE)
        _check(self.library.cublasCreate_v2(ctypes.byref(self.handle)))

    def gemm(self, call: Gemm, a: Array, b: Array, out: Array, add: bool) -> None:
        """Start out = a b on the current stream, or out += a b."""
        stream = self.xp.cuda.get_current_stream().ptr
        if stream != self.stream:  # which also takes the workspace away
            _check(self.library.cublasSetStream_v2(self.handle, ctypes.c_void_p(stream)))
            workspace = ctypes.c_void_p(self.workspace.ptr), ctypes.c_size_t(WORKSPACE)
            _check(self.library.cublasSetWorkspace_v2(self.handle, *workspace))
            self.stream = stream
        number, long, pointer = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p
        one, beta = ctypes.c_float(1), ctypes.c_float(add)
        _check(
            self.library.cublasGemmStridedBatchedEx(
                self.handle, number(call.transpose_b), number(call.transpose_a),
                number(call.n), number(call.m), number(call.k), ctypes.byref(one),
                pointer(b.data.ptr), number(FLOAT32), number(call.leading_b), long(call.stride_b),
                pointer(a.data.ptr), number(FLOAT32), number(call.leading_a), long(call.stride_a),
                ctypes.byref(beta), pointer(out.data.ptr), number(FLOAT32),
                number(call.leading_out), long(call.stride_out),
                number(call.count), number(COMPUTE_32F), number(DEFAULT_ALGORITHM),
            )
        )  # fmt: skip


def load(xp: ModuleType) -> ctypes.CDLL:
    """Load the cuBLAS that CuPy uses, which it has loaded by then."""
    importlib.import_module("cupy_backends.cuda.libs.cublas")
    return ctypes.CDLL(f"libcublas.so.{xp.cuda.runtime.runtimeGetVersion() // 1000}")


def _check(status):
    if status:
        raise RuntimeError(f"cuBLAS: status {status}")
