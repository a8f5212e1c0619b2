"""Dead codes of a codebook, nearest to no latent, are re-initialised from encoder outputs."""

import numpy as np

from tinyldm.backend import array_module, to_device
from tinyldm.models import VQModel
from tinyldm.nn import no_grad
from tinyldm.threads import map_batch
from tinyldm.training.state import State

EVERY = 25  # steps, in the first half of the stage
IMAGES = 128  # images in which unused codes are looked for


def due(state: State) -> bool:
    """Return whether to look for dead codes after this step."""
    return state.step % EVERY == 0 and state.step <= (state.total or 10**9) // 2


def reinitialise_dead_codes(
    vae: VQModel, state: State, pixels: np.ndarray, rng: np.random.Generator
) -> int:
    """Re-initialise every code that none of these images uses to one of their latents; → how many.

    pixels (n, h, w, 3) in −1…1, on the device. The codes' average starts there too, their moments
    at 0 (van den Oord et al. leave such codes dead; Dhariwal et al. 2020, Jukebox, section 3.2,
    restart them).
    """

    def encode(x):
        with no_grad():
            return vae.encode(state.params, x)[0]

    z = map_batch(encode, pixels)
    z = z.reshape(-1, z.shape[-1])
    xp = array_module(z)
    name, count = vae.quantize.weight, vae.quantize.count
    used = xp.bincount(vae.quantize.codes(state.params, z), minlength=count)
    dead = np.flatnonzero(to_device(used, "cpu") == 0)
    if len(dead):
        chosen = xp.asarray(rng.integers(0, len(z), len(dead)))
        at = xp.asarray(dead)
        for named, rows in (
            (state.params, z[chosen]),
            (state.average, z[chosen]),
            (state.moments["m"], 0),
            (state.moments["v"], 0),
        ):
            named[name][at] = rows
    return len(dead)
