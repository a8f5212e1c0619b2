"""Training beside PyTorch."""

from bench.compare import Rows, Run, row
from bench.nets import AutoencoderStep, UNetStep
from bench.optimizer import OptimizerStep

CASES = (
    UNetStep((64, 128), layers=1, side=8, samples=64, context=(16, 64)),
    UNetStep((128, 256, 256), layers=2, side=16, samples=16, context=(16, 128)),
    AutoencoderStep((32, 64, 64), layers=1, side=32, samples=32),
    OptimizerStep((160, 288, 384)),
)
TINY = (
    UNetStep((32, 64), layers=1, side=4, samples=2, context=(4, 32)),
    AutoencoderStep((32, 32), layers=1, side=8, samples=2),
    OptimizerStep((32, 64)),
)


def table(run: Run) -> Rows:
    """Train steps: forward and backward, and the update

    MB: the highest resident memory of a process of its own during two steps, less what it held
    with weights and inputs made: activations, gradients and workspace. PyTorch's is in the format
    in which it is faster. Of the limit: SGEMM for the networks, with convolutions counted as direct
    ones; for the update the copy's bandwidth.
    """

    def beyond(before, most):
        return most - before

    for case in TINY if run.tiny else CASES:
        yield row(case, run, beyond)
