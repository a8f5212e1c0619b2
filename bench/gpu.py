"""The same on a GPU: `python -m bench.gpu`.

First it compares GPU and CPU: forward and backward of a U-Net and of an autoencoder, and the
latents after ten steps of sampling. Then it times train steps and a sampling step beside PyTorch on
the same GPU, where PyTorch is installed with CUDA. All is in float32, without TF32.
"""

import os
import sys
from itertools import islice

from bench.compare import Rows, Run, check, load_peer, relative, speed
from bench.nets import AutoencoderStep, TrainStep, UNetStep, step_difference
from bench.report import write
from bench.sample import SamplingStep
from bench.train import CASES
from tinyldm.backend import DeviceError, to_device
from tinyldm.threads import describe_device

DEVICE = "cuda"
ROUNDS = 15
PARITY = (
    UNetStep((32, 64), layers=1, side=8, samples=8, context=(16, 64)),
    AutoencoderStep((32, 64), layers=1, side=32, samples=4),
)
SAMPLING = SamplingStep("demo", 16)
STEPS = 10
STEP_TOLERANCE = 1e-4  # relative, of the gradient as one long vector
SAMPLES_TOLERANCE = 1e-3  # of latents: each step begins with the difference that the last one made


def main() -> None:
    """Exit code 2 where there is no GPU, or no CuPy."""
    os.environ["CUPY_TF32"] = "0"  # CuPy reads it when it is imported
    try:
        print(describe_device(DEVICE))
    except DeviceError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    for case in PARITY:
        report(f"{case.name}, gradients", gradients_differ(case), STEP_TOLERANCE)
    report(f"{SAMPLING.name}, {STEPS} steps", samples_differ(SAMPLING), SAMPLES_TOLERANCE)
    peer = load_peer()
    peer = peer if peer and peer.prepare_gpu() else None
    print(peer.describe_device() if peer else "without PyTorch: it takes CUDA and diffusers")
    write(table, Run(tiny=False, rounds=ROUNDS, limits=None, peer=peer), print)


def report(name: str, difference: float, tolerance: float) -> None:
    """SystemExit if it is above the tolerance."""
    print(f"{name}: GPU and CPU differ by {difference:.1e}, allowed {tolerance:.0e}")
    check(name, difference, tolerance)


def gradients_differ(case: TrainStep) -> float:
    """Between CPU and GPU, relative; of the loss if that differs more."""
    params = case.params()
    here = case.ours(params, "cpu")()
    loss, grads = (to_device(x, "cpu") for x in case.ours(params, DEVICE)())
    return step_difference((loss, grads), here)


def samples_differ(case: SamplingStep) -> float:
    """Between latents of CPU and GPU, relative."""
    params, latents = case.params(), []
    for device in (DEVICE, "cpu"):
        *_, (x, _) = islice(case.sampler(params, device)(), STEPS)
        latents.append(to_device(x, "cpu"))
    return relative(*latents)


def table(run: Run) -> Rows:
    """On the GPU

    A time ends when the GPU has done all its work. For the update, PyTorch uses its foreach
    functions.
    """
    import cupy

    # It waits for all streams of the device, those of PyTorch too.
    wait = cupy.cuda.Device().synchronize
    for case in (*CASES, SAMPLING):
        yield speed(case, run, DEVICE, wait)[0]


if __name__ == "__main__":
    main()
