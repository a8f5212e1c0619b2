"""Make golden.npz: what torch, diffusers and transformers compute for golden_cases.py.

    python tests/golden/make_golden.py        (needs the packages of tinyldm[parity])

Everything is float64 and comes out the same to about 1e-14 on any machine. tests/test_golden.py
checks the networks against the file, so that the main numbers are checked without torch too.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent)]

import golden_cases as cases  # noqa: E402
import peers  # noqa: E402
from model_cases import integers, numbers, random_params, unet_inputs  # noqa: E402

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
    np.savez(Path(__file__).with_name("golden.npz"), **stored)


def select(model, result, names):
    y, grads = result
    return {f"{model}: y": y} | {f"{model}: {name}": grads[name] for name in names}


if __name__ == "__main__":
    main()
