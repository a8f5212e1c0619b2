"""Run every kernel of kernels.cu under a sanitizer: `python sanitized.py thread|address [FAULT]`.

The test that starts it sets LD_PRELOAD and PYTHONPATH. A block's threads are then threads of the
system, and the sanitizer ends the process where two of them race, or one leaves its array. FAULT
is planted first, to see that it does: a part of the source, and what takes its place, with "=>"
between.
"""

import sys

import cuda_on_cpu
import numpy as np
import strict
from cuda_calls import examples, results, small, with_barriers
from strategies import CUDA_CALLS

from tinyldm.kernels.cpu.flat import Flat
from tinyldm.kernels.cuda import adamw, launch, muon


def main(sanitizer, fault="=>"):
    before, after = fault.split("=>")
    code = launch.SOURCE.read_text()
    assert before in code
    module = cuda_on_cpu.RawModule(code.replace(before, after, 1), sanitize=sanitizer)
    launch._function = lambda xp, name: module.get_function(name)
    for cut in (False, True):
        with small(cut):
            for _, call in with_barriers():
                results(call)
            for twin, name in CUDA_CALLS:
                list(map(results, examples(twin, name)))
            flat = [Flat({"a": strict.asarray(np.ones((3, 5), "f4"))}) for _ in range(4)]
            moments = dict(zip("mv", flat[1:3], strict=True))
            adamw.fused_adamw(flat[0], dict(flat[0]), moments, flat[3], 0, 0.1)
            muon.fused_muon(flat[0], dict(flat[0]), flat[1], flat[3], 0, 0.1)
    print("every kernel has run")


main(*sys.argv[1:])
