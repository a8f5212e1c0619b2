"""How fast is it? `python -m bench [--tiny]` prints a table, and asserts nothing.

Every row runs in turn with its rival (PyTorch with diffusers, where they are installed) so that a
noisy machine treats both alike; what counts is the median of the ratios, not a single time. The
outputs are compared first: a fast wrong answer is not shown.
"""

import argparse
import time

import numpy as np
from threadpoolctl import threadpool_info

from tinyldm.backend import cores
from tinyldm.data.shapes import make_shapes
from tinyldm.models import AutoencoderKL, Tokenizer
from tinyldm.nn import functional as F
from tinyldm.training.parallel import value_and_grad
from tinyldm.training.presets import PRESETS
from tinyldm.training.stages import Models, autoencoder_loss

try:
    import torch
    from diffusers import AutoencoderKL as TorchAutoencoder
    from diffusers import UNet2DConditionModel
except ImportError:
    torch = None


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes: does it still run?")
    options = parser.parse_args()
    rounds = 2 if options.tiny else 9
    config = PRESETS["tiny" if options.tiny else "demo"]
    blas = [p for p in threadpool_info() if p["user_api"] == "blas"][0]
    print(f"NumPy {np.__version__}, {blas['internal_api']} core {blas.get('architecture')}, "
          f"{cores()} cores" + (f", PyTorch {torch.__version__}" if torch else ""))  # fmt: skip
    print(f"SGEMM: {sgemm(256 if options.tiny else 2048):.0f} GF/s")
    print(f"{'train step (forward + backward)':44}{'tinyldm':>10}{'PyTorch':>10}  ratio (spread)")
    for name, ours, theirs in rows(config):
        times = interleaved([ours, theirs] if theirs else [ours], rounds)
        line = f"{name:44}{np.median(times[0]) * 1e3:8.0f}ms"
        if theirs:
            ratio = times[1] / times[0]
            low, high = np.quantile(ratio, [0.1, 0.9])
            line += (
                f"{np.median(times[1]) * 1e3:8.0f}ms  {np.median(ratio):.2f} ({low:.2f}–{high:.2f})"
            )
        print(line, flush=True)


def sgemm(n):
    """The matrix product's own rate, the limit of everything here, in GF/s."""
    a = np.ones((n, n), np.float32)
    a @ a
    seconds = min(_time(lambda: a @ a) for _ in range(5))
    return 2 * n**3 / seconds / 1e9


def rows(config):
    """(name, our function, PyTorch's or None) for the two train steps of a preset."""
    rng = np.random.default_rng(0)
    _, captions = make_shapes(64, config.side)
    models = Models(config, Tokenizer.train(captions, config.vocabulary, config.tokens))
    yield autoencoder_row(config, rng)
    yield denoiser_row(config, models, rng)


def autoencoder_row(config, rng):
    vae = AutoencoderKL(config.vae_config())
    params = vae.init(rng)
    n, side = config.autoencoder.batch, config.side
    images = rng.standard_normal((n, side, side, 3), dtype=np.float32)
    small = side // vae.factor
    noise = rng.standard_normal((n, small, small, config.latent_channels), dtype=np.float32)
    loss_fn = autoencoder_loss(vae, kl_weight=0.0)
    name = f"autoencoder {config.vae_widths}, {side}×{side}, batch {n}"

    def ours():
        return value_and_grad(loss_fn, params, (images, noise))[0]

    if not torch:
        return name, ours, None
    model = _copy(params, TorchAutoencoder(**config.vae_config()))
    x, epsilon = (_torch(a) for a in (images, noise))

    def theirs():
        posterior = model.encode(x).latent_dist
        reconstruction = model.decode(posterior.mean + posterior.std * epsilon).sample
        loss = (reconstruction - x).square().mean()
        loss.backward()
        return loss.item()

    _same(ours(), theirs())
    return name, ours, theirs


def denoiser_row(config, models, rng):
    params = models.unet.init(rng) | models.text.init(rng)
    # Weights that start at zero would hide an error in all that comes before them.
    for name in params:
        params[name] = params[name] + rng.normal(0, 0.02, params[name].shape).astype(np.float32)
    n, side = config.denoiser.batch, models.unet.config.sample_size
    z, noise = rng.standard_normal((2, n, side, side, config.latent_channels), dtype=np.float32)
    t = rng.integers(0, 1000, n)
    name = f"U-Net {config.unet_widths}, {side}×{side}, batch {n}"
    context = rng.standard_normal((n, config.tokens, config.text_width), dtype=np.float32)

    def loss_fn(params, z, noise, context, t):
        prediction, unet_back = models.unet(params, z, t, context)
        loss, loss_back = F.mse(prediction, noise)
        return loss, lambda grads: unet_back(loss_back()[0], grads)

    def ours():
        return value_and_grad(loss_fn, params, (z, noise, context, t))[0]

    if not torch:
        return name, ours, None
    shapes = models.unet.shapes()
    model = _copy({k: params[k] for k in shapes}, UNet2DConditionModel(**config.unet_config()))
    x, target = (_torch(a) for a in (z, noise))
    c, steps = torch.from_numpy(context), torch.from_numpy(t)

    def theirs():
        loss = (model(x, steps, c).sample - target).square().mean()
        loss.backward()
        return loss.item()

    _same(ours(), theirs())
    return name, ours, theirs


def _copy(params, model):
    """Our weights in the model of diffusers, in channels-last memory, its faster format here."""
    model.load_state_dict(
        {k: torch.from_numpy(v.transpose(3, 2, 0, 1).copy() if v.ndim == 4 else v)
         for k, v in params.items()}
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def _torch(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)  # already channels last in memory


def _same(ours, theirs):
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise SystemExit(f"the losses differ: tinyldm {ours}, PyTorch {theirs}")


def interleaved(functions, rounds):
    """Times (functions, rounds) of a b a b …, after one round to warm up."""
    for function in functions:
        function()
    return np.array([[_time(function) for function in functions] for _ in range(rounds)]).T


def _time(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


main()
