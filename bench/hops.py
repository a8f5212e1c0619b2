"""Count what one has to read: the functions and files that a step of the demo passes through.

    python -m bench hops

Counted are code objects under tinyldm/, by `sys.setprofile`, with the plain functions and with
kernels.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tinyldm
from tinyldm.kernels import plain
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.models import Tokenizer, UNet
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.networks import Models, denoiser_loss
from tinyldm.training.presets import PRESETS
from tinyldm.training.state import State
from tinyldm.training.step import stage_gradient, train_step

ROOT = str(Path(tinyldm.__file__).parent)
CAPTION = "a red circle"


def passed(function: Callable[[], object]) -> set[tuple[str, int, str]]:
    """Return (file, line, name) of everything of tinyldm that a call runs through."""
    found = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT):
            found.add((code.co_filename, code.co_firstlineno, code.co_name))

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def steps() -> dict[str, Callable[[], Callable[[], object]]]:
    """Return {name: a function that prepares the step} of what is counted."""
    config = PRESETS["demo"]
    tokenizer = Tokenizer.train([CAPTION] * 2, config.vocabulary, config.tokens)
    models = Models(config, tokenizer)
    rng = np.random.default_rng(0)
    h, w, c = config.latent_shape

    def train():
        params = models.init_denoiser(rng)
        state = State(config, "denoiser", params, tokenizer, "", total=10)
        z, noise = rng.standard_normal((2, 4, h, w, c), np.float32)
        batch = z, noise, tokenizer([CAPTION] * 4), rng.integers(0, 1000, 4)
        stack = contextlib.ExitStack()
        gradient_of = stack.enter_context(
            stage_gradient(denoiser_loss(models), state, 1, {}, processes=1)
        )
        return lambda: train_step(state, gradient_of, batch, 1e-3, 0.99)

    def sample():
        configs = config.configs(tokenizer)
        params = {
            "unet": models.unet.init(rng),
            "vae": models.vae.init(rng),
            "text_encoder": models.text.init(rng),
        }
        pipe = Pipeline(configs, params, tokenizer, {"steps": 4, "guidance": 2.0})
        path = pipe.denoise(pipe.sampling_params(CAPTION))
        next(path)
        return lambda: next(path)

    def unet():
        net = UNet(config.unet_config())
        params = Flat(net.init(rng))
        x = rng.standard_normal((2, h, w, c), np.float32)
        context = rng.standard_normal((2, config.tokens, config.text_width), np.float32)

        def both_ways():
            y, backward = net(params, x, np.array([5, 7]), context)
            backward(y, {})

        return both_ways

    return {"train step": train, "sampling step": sample, "U-Net, both ways": unet}


def main() -> None:
    """Print a table."""
    print("| step | plain: functions, files | with kernels: functions, files |\n|---|---|---|")
    for name, prepare in steps().items():
        cells = []
        for way in (plain, contextlib.nullcontext):
            with way():
                step = prepare()
                step()  # what is done once is no part of a step
                found = passed(step)
            cells.append(f"{len(found)}, {len({file for file, *_ in found})}")
            if "-v" in sys.argv and way is plain:
                for file, line, function in sorted(found):
                    print(f"  {file.removeprefix(ROOT)}:{line} {function}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
