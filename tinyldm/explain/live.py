"""live.html: a page in which the reader's own model generates, in plain JavaScript."""

import base64
import html
import re
from collections.abc import Sequence

import numpy as np

from tinyldm.backend import to_device
from tinyldm.config import per_block
from tinyldm.data.byte_pairs import SYMBOLS
from tinyldm.diffusion.timesteps import timesteps
from tinyldm.explain.page import fill, json_for_html
from tinyldm.models import ClassNames, VQModel
from tinyldm.sampling.pipeline import Pipeline

MOST = 10_000_000  # parameters: a page of 27 MB
STEPS = (5, 10, 25, 50)  # of sampling; with fewer the first would not be at noise alone
DECODER = ("decoder.", "post_quant_conv.")  # what of the first stage generates
NOTHING = {"captions": "no caption", "classes": "no class", "noise": "noise alone"}
MOST_WORDS = 500  # different words of the captions, below which unknown ones are named


class NoLivePage(ValueError):
    """The model cannot run in a page, for the reason that it says."""


def live_page(name: str, pipeline: Pipeline, captions: Sequence[str]) -> str:
    """Return the page as HTML. NoLivePage for a model that is too large, or has an init image.

    name: of the run. captions: those of the training images, of which some are suggested; none for
    a model that generates from noise alone.
    """
    params = live_params(pipeline)
    count = sum(w.size for w in params.values())
    if count > MOST:
        raise NoLivePage(f"expected at most {MOST:,} parameters, found {count:,}")
    if isinstance(pipeline.vae, VQModel):
        raise NoLivePage("expected a KL autoencoder or none, found a codebook")
    if pipeline.task != "generation":
        raise NoLivePage(
            f"expected a model that needs no init image, found one for {pipeline.task}"
        )
    numbers = base64.b64encode(b"".join(w.tobytes() for w in params.values())).decode()
    words = sorted({word for text in captions for word in re.findall(r"[^\W_]+", text.lower())})
    kind = "noise"
    if any(captions):
        kind = "classes" if isinstance(pipeline.tokenizer, ClassNames) else "captions"
    has = {kind: True, "asked": kind != "noise", "autoencoder": bool(pipeline.vae.shapes())}
    model = network_config(pipeline) | {
        "shapes": [[key, list(w.shape)] for key, w in params.items()],
        "captions": list(dict.fromkeys(captions))[:200] or [""],
        "words": words if kind == "captions" and len(words) <= MOST_WORDS else None,
        "guidance": pipeline.defaults["guidance"],
        "has": [name for name, there in has.items() if there],
        "nothing": NOTHING[kind],
    }
    texts = {"name": html.escape(name), "parameters": f"{count:,}", "weights": numbers}
    texts["model"] = json_for_html(model)
    return fill("live.html", "live.js", "network.js", **texts)


def live_params(pipeline: Pipeline) -> dict[str, np.ndarray]:
    """Return the weights that generate, {component.name: float16}. NoLivePage if one is too large.

    Numbers lie as they do in memory, so kernels are (height, width, in, out).
    """
    params = {}
    for component, named in pipeline.params.items():
        for name, w in named.items():
            if component != "vae" or name.startswith(DECODER):
                with np.errstate(over="ignore"):
                    params[f"{component}.{name}"] = to_device(w, "cpu").astype("<f2")
                if not np.isfinite(params[f"{component}.{name}"]).all():
                    raise NoLivePage(f"{component} {name}: expected numbers below 65,504")
    return params


def network_config(pipeline: Pipeline) -> dict:
    """Return all that the networks of the page need to know besides weights, for JSON."""
    unet, vae, schedule = pipeline.unet.config, pipeline.vae.config, pipeline.schedule
    h, w = (side // pipeline.vae.factor for side in pipeline.size)
    steps = [n for n in STEPS if n <= len(schedule)]
    visited = {n: timesteps(schedule, n).tolist() for n in steps}
    alphas_bar = schedule.alphas_bar
    to_one = schedule.config.get("set_alpha_to_one", True)
    levels = len(unet.block_out_channels)
    text = pipeline.text_encoder and vars(pipeline.text_encoder.config)
    return {
        "size": {"h": h, "w": w, "c": pipeline.vae.latent_channels},
        "prediction": schedule.prediction,
        "levels": {n: [[t, alphas_bar[t]] for t in of_n] for n, of_n in visited.items()},
        "final_level": 1.0 if to_one else alphas_bar[0],
        "unet": {
            "groups": unet.norm_num_groups,
            "eps": unet.norm_eps,
            "heads": per_block("unet config", "heads", unet.attention_head_dim, levels),
            "narrowest": pipeline.unet.linear_1.d_in,
            "flip": unet.flip_sin_to_cos,
            "shift": unet.freq_shift,
            "pool_heads": unet.addition_embed_type_num_heads,
        },
        "vae": {
            "scale": vae.scaling_factor,
            "shift": getattr(pipeline.vae, "shift", 0),
            "groups": getattr(vae, "norm_num_groups", 1),
            "levels": len(getattr(vae, "block_out_channels", [0])),
        },
        "text": text,
        "tokenizer": _tokenizer_config(pipeline.tokenizer),
    }


def _tokenizer_config(tokenizer):
    if isinstance(tokenizer, ClassNames):
        names = [*tokenizer.names, ""]
        return {"classes": dict(zip(names, tokenizer(names).tolist(), strict=True))}
    return {
        "vocab": tokenizer.vocab,
        "merges": {" ".join(pair): rank for rank, pair in enumerate(tokenizer.merges)},
        "symbols": [SYMBOLS[byte] for byte in range(256)],
        "length": tokenizer.max_length,
        "start": tokenizer.start_id,
        "end": tokenizer.end_id,
        "pad": tokenizer.pad_id,
    }
