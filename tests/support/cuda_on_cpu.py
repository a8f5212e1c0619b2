"""CUDA on the CPU: kernels.cu compiled by g++, in the place of `cupy.RawModule`.

A kernel is given what CuPy would give it, pointers and numbers. Where CuPy would not notice that
they are not those of its declaration, or that an array has gaps, this says so.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

HEADER = Path(__file__).with_suffix(".h")
COMPILER = shutil.which("g++")
NO_COMPILER = "no g++, which compiles kernels.cu for the CPU"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
DTYPES = {"float": "float32", "int": "int32", "long long": "int64"}


class RawModule:
    """A module of kernels, with the names and arguments of CuPy's RawModule.

    sanitize: "thread" or "address", for threads of the system and a library that is loaded with
    that of the sanitizer.
    """

    def __init__(self, code: str, options: tuple[str, ...] = (), sanitize: str = ""):
        self.kernels = {name: _parameters(text) for name, text in KERNEL.findall(code)}
        self.library = ctypes.CDLL(str(compiled(code, sanitize)))

    def get_function(self, name):
        return functools.partial(_launch, self.library[f"{name}_on_cpu"], name, self.kernels[name])


def compiled(code: str, sanitize: str = "") -> Path:
    """Return the library of these kernels, compiled once."""
    names = [name for name, _ in KERNEL.findall(code)]
    unit = "\n".join([HEADER.read_text(), code, *(f"ON_CPU({name})" for name in names)])
    flags = [f"-fsanitize={sanitize}", "-DREAL_THREADS", "-g"] if sanitize else []
    return _library(unit, flags)


@functools.cache
def load(file: str) -> ctypes.CDLL:
    """Load the library of a source file that lies here."""
    return ctypes.CDLL(str(_library(HEADER.with_name(file).read_text(), [])))


def _library(source, flags):
    if COMPILER is None:
        raise RuntimeError(NO_COMPILER)
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", *flags]
    key = hashlib.sha256("\n".join([source, *flags]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"tinyldm-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            file, made = Path(scratch) / "source.cpp", Path(scratch) / "library.so"
            file.write_text(source)
            command = [COMPILER, *flags, "-o", str(made), str(file)]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            made.replace(library)
    return library


def _parameters(text):
    """→ [(dtype, is it a pointer, may it be written to)] of a declaration."""
    found = []
    for one in " ".join(text.split()).split(", "):
        kind, _, _ = one.rpartition(" ")
        pointer = kind.endswith("*")
        name = kind.removeprefix("const ").rstrip("*")
        found.append((DTYPES[name], pointer, pointer and not kind.startswith("const ")))
    return found


def _launch(function, name, parameters, grid, block, args):
    if len(args) != len(parameters):
        raise TypeError(f"{name}: expected {len(parameters)} arguments, found {len(args)}")
    if not 0 < np.prod(block) <= 1024 or min(grid) < 1 or grid[1] > 65535 or grid[0] >= 2**31:
        raise ValueError(f"{name}: no launch of {grid} blocks of {block} threads")
    memory = []
    for i, (arg, (dtype, pointer, written)) in enumerate(zip(args, parameters, strict=True)):
        if arg.dtype != dtype:
            raise TypeError(f"{name}: argument {i} is {dtype} there, and {arg.dtype} here")
        if pointer:
            host = arg._host
            if not host.flags.c_contiguous or written and not host.flags.writeable:
                raise ValueError(f"{name}: argument {i} has gaps, or is read-only")
            memory.append(ctypes.c_void_p(host.ctypes.data))
        else:
            memory.append(np.ctypeslib.as_ctypes_type(arg.dtype)(arg.item()))
    addresses = (ctypes.c_void_p * len(memory))(*map(ctypes.addressof, memory))
    sizes = ((ctypes.c_int * 2)(*size) for size in (grid, block))
    if function(*sizes, addresses):
        raise RuntimeError(f"{name}: some threads of a block wait for others that have ended")
