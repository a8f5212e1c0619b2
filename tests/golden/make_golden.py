"""Make golden.npz: what torch, diffusers and transformers compute for golden_cases.py.

    python tests/golden/make_golden.py        (needs the packages of tinyldm[parity])

Everything is float64 and comes out the same to about 1e-14 on any machine. tests/test_golden.py
checks the networks against the file, so that the main numbers are checked without torch too.
"""

import inspect
import json
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "parity"), str(TESTS.parent)]

import diffusers  # noqa: E402
import golden_cases as cases  # noqa: E402
import peers  # noqa: E402
import pytest  # noqa: E402
import test_scheduler_parity as schedulers  # noqa: E402
import test_solver_parity as solvers  # noqa: E402
import torch  # noqa: E402
from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from model_cases import integers, numbers, random_params, unet_inputs  # noqa: E402

from tinyldm.diffusion import SAMPLERS  # noqa: E402
from tinyldm.models import AutoencoderKL, TextEncoder, UNet  # noqa: E402


def main():
    params = random_params(UNet(cases.UNET).shapes())
    dy = numbers("dy", 2, 5, 7, 3)
    unet = peers.unet(cases.UNET, params, *unet_inputs(cases.UNET), dy)

    params = random_params(AutoencoderKL(cases.VAE).shapes())
    encoder = peers.autoencoder(
        cases.VAE, params, "to_latents", numbers("images", 2, 6, 4, 3),
        numbers("dy", 2, 3, 2, 4), numbers("noise", 2, 3, 2, 4),
    )  # fmt: skip
    decoder = peers.autoencoder(
        cases.VAE, params, "from_latents", numbers("latents", 2, 3, 2, 4), numbers("dy", 2, 6, 4, 3)
    )

    params = random_params(TextEncoder(cases.TEXT).shapes())
    ids = integers("ids", cases.TEXT["vocab_size"], 2, 5)
    text = peers.text_encoder(cases.TEXT, params, ids, numbers("dy", 2, 5, 12))

    stored = {
        **select("unet", unet, cases.UNET_GRADIENTS),
        **select("to_latents", encoder, cases.ENCODER_GRADIENTS),
        **select("from_latents", decoder, cases.DECODER_GRADIENTS),
        **select("text", text, cases.TEXT_GRADIENTS),
    }
    with pytest.MonkeyPatch.context() as patch:
        for module in solvers.MODULES:
            patch.setattr(module, "np", solvers.NumpyInFloat64())
        made = dict(trajectories(patch))
    configs = {key: without_defaults(key, config) for key, (config, _) in made.items()}
    stored["sampler configs"] = json.dumps(configs)
    stored["samples"] = np.stack([x[[len(x) // 2, -1]] for _, x in made.values()])
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **stored)


def trajectories(patch):
    """Yield "sampler, steps, what else" and a scheduler's config, and the x after each step."""
    for name, config in solvers.CASES:
        for steps in cases.SAMPLER_STEPS:
            made, _, expected = solvers.ours_and_theirs(name, config, "epsilon", steps, patch)
            if expected is not None and not solvers.differs(name, config, steps):
                yield f"{name}, {steps}, {config}", (made, expected)
    for config in ("Stable Diffusion", "pixels", "trailing"):
        for steps in cases.SAMPLER_STEPS:
            x, noises = schedulers.start(steps)
            for kind, name, options in (
                (DDIMScheduler, "ddim", {}),
                *((DDPMScheduler, "ddpm", {"variance_type": v}) for v in cases.VARIANCES),
            ):
                theirs, ours = schedulers.both_schedules(kind, schedulers.CONFIGS[config] | options)
                feed = iter(noises)
                patch.setattr(
                    schedulers.scheduling_ddpm,
                    "randn_tensor",
                    lambda *_, feed=feed, **__: torch.tensor(next(feed)),
                )
                pairs = schedulers.their_trajectory(
                    theirs, x, steps, lambda i, said, t, x, theirs=theirs: theirs.step(said, t, x)
                )
                what = ", ".join([config, *options.values()])
                yield f"{name}, {steps}, {what}", (ours.config, np.array(pairs)[:, 0])


def without_defaults(key, config):
    """Leave out of a scheduler's config what its class takes by default: ours must know it."""
    kind = SAMPLERS[key.split(",")[0]].scheduler
    defaults = inspect.signature(getattr(diffusers, kind).__init__).parameters
    given = {"_class_name": kind}
    for name, value in config.items():
        if name in defaults and value != defaults[name].default:
            given[name] = value
    return given


def select(model, result, names):
    y, grads = result
    return {f"{model}: y": y} | {f"{model}: {name}": grads[name] for name in names}


if __name__ == "__main__":
    main()
