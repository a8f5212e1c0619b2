"""Count the kernels that a step launches on a GPU, without one: `python -m tests.launches`.

Before: without kernels for a GPU. Then with them, at the first step, and as a graph, which is one
launch. They are counted on the double of CuPy, and what is ours does not run, as the numbers do not
matter here. A launch costs the host about nine microseconds: at most of these sizes more than the
device needs for it.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "support"))

import strict

from tinyldm import backend
from tinyldm.data.shapes import make_shapes
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.kernels.cuda import launch
from tinyldm.kernels.cuda.graph import WARM
from tinyldm.models import Tokenizer
from tinyldm.nn.optim import adam_state, adamw, clip_factor, global_norm, is_inner, muon
from tinyldm.nn.protocol import KERNELS
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.networks import Models, denoiser_loss
from tinyldm.training.presets import PRESETS
from tinyldm.training.state import State
from tinyldm.training.step import gradient

CONFIG = PRESETS["demo"]
BATCH = 2  # the count is the same for all


@contextlib.contextmanager
def kernels(fused: bool):
    """With our kernels, which are counted and do not run, or without them."""
    before = {twin: list(known) for twin, known in KERNELS.items()}
    function, launch._function = launch._function, lambda xp, name: _count
    for known in KERNELS.values():
        known[:] = [k for k in known if fused or ".cuda." not in k.function.__module__]
    special, backend.SPECIAL_FUNCTIONS["strict"] = backend.SPECIAL_FUNCTIONS, "strict"
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        for twin, known in KERNELS.items():
            known[:] = before[twin]
        launch._function = function
        del special["strict"]


def _count(grid, block, args):
    strict.launches += 1


def on_device(named):
    return {name: strict.asarray(np.asarray(w, "float32")) for name, w in named.items()}


def demo():
    captions = make_shapes(64, CONFIG.side, 0)[1]
    return captions, Models(CONFIG, Tokenizer.train(captions, CONFIG.vocabulary, CONFIG.tokens))


def sampling_step():
    """A step of DDIM with guidance, one image."""
    captions, models = demo()
    rng = np.random.default_rng(0)
    networks = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text}
    params = {name: on_device(network.init(rng)) for name, network in networks.items()}
    model = Pipeline(CONFIG.configs(models.tokenizer), params, models.tokenizer)

    def launches(steps):
        options = {"steps": steps, "guidance": 2.0, "sampler": "ddim"}
        with strict.counting() as counts:
            list(model.denoise(model.sampling_params(captions[:1], **options)))
        return counts.launches

    return launches(2) - launches(1), launches(5) - launches(4)


def denoiser_step():
    """A step of the demo's second stage without its update: loss and gradients."""
    captions, models = demo()
    rng = np.random.default_rng(0)
    state = State(CONFIG, "denoiser", on_device(models.init_denoiser(rng)), models.tokenizer, "")
    z, noise = rng.standard_normal((2, BATCH, *CONFIG.latent_shape), np.float32)
    ids = strict.asarray(models.tokenizer(captions[:BATCH]))
    t = strict.asarray(rng.integers(0, 1000, BATCH))
    batch = strict.asarray(z), strict.asarray(noise), ids, t
    return first_and_last(denoiser_loss(models), state.params, batch)


def first_and_last(loss_fn, params, batch):
    """Count the launches of the first step, and of one that has become a graph."""
    launches = []
    with gradient(loss_fn, params) as gradient_of:
        for _ in range(WARM + 2):
            with strict.counting() as counts:
                gradient_of(batch)
            launches.append(counts.launches)
    return launches[0], launches[-1]


def autoencoder_step():
    """A step of the demo's first stage without its update."""
    _, models = demo()
    rng = np.random.default_rng(0)
    params = on_device(models.vae.init(rng))
    images = strict.asarray(rng.standard_normal((BATCH, 32, 32, 3), np.float32))
    noise = strict.asarray(rng.standard_normal((BATCH, *CONFIG.latent_shape), np.float32))
    return first_and_last(models.first_stage_loss(), params, (images, noise))


def update():
    """Clipping, AdamW and the moving average, all of the U-Net's parameters."""
    _, models = demo()
    params = on_device(models.unet.init(np.random.default_rng(0)))
    grads = dict(params)
    weights, average = Flat(params), Flat(params)
    moments = {name: Flat(group) for name, group in adam_state(params).items()}
    with strict.counting() as counts:
        factor = clip_factor(global_norm(grads), 1.0)
        adamw(weights, grads, moments, average, 0, 1e-3, factor)
    return counts.launches, counts.launches


def muon_update():
    """Muon and the moving average of the demo's inner matrices."""
    _, models = demo()
    params = on_device(models.init_denoiser(np.random.default_rng(0)))
    inner = {name: w for name, w in params.items() if is_inner(name, w)}
    weights, momentum, average = (Flat(params, first=inner) for _ in range(3))
    factor = strict.asarray(np.float32(1))
    with strict.counting() as counts:
        muon(weights, inner, momentum, average, 0, 0.01, factor)
    return counts.launches, counts.launches


CASES = {
    "the demo's sampling step, batch 1": sampling_step,
    "its train step, U-Net and text": denoiser_step,
    "its train step, autoencoder": autoencoder_step,
    "clip, AdamW, average": update,
    "Muon, average": muon_update,
}


def main():
    print(f"{'launches':36}{'before':>8}{'fused':>8}{'graph':>8}")
    for name, case in CASES.items():
        with kernels(fused=False):
            before, _ = case()
        with kernels(fused=True):
            now, graphed = case()
        print(f"{name:36}{before:8,}{now:8,}{graphed:8,}", flush=True)


if __name__ == "__main__":
    main()
