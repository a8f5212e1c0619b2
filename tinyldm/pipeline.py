"""Text → latents → picture, and the folder that a model lives in.

The folder is diffusers' own layout (`model_index.json`, one sub-folder a component), whether
tinyldm trained the model or somebody else did, and diffusers loads what tinyldm saves.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm.backend import array_module, map_batch, to_device
from tinyldm.diffusion.samplers import SAMPLERS, guided
from tinyldm.diffusion.schedule import Schedule
from tinyldm.files import read_json, write_json
from tinyldm.models import AutoencoderKL, TextEncoder, Tokenizer, UNet
from tinyldm.models.weights import load_component, save_weights
from tinyldm.nn import no_grad

COMPONENTS = {  # folder → (library and class that diffusers loads, our class, file of weights)
    "unet": (("diffusers", "UNet2DConditionModel"), UNet, "diffusion_pytorch_model.safetensors"),
    "vae": (("diffusers", "AutoencoderKL"), AutoencoderKL, "diffusion_pytorch_model.safetensors"),
    "text_encoder": (("transformers", "CLIPTextModel"), TextEncoder, "model.safetensors"),
}
SCHEDULERS = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "PNDMScheduler": "pndm"}
DIFFUSERS_VERSION = "0.32.0"  # whose file formats these are
DEFAULTS = {"steps": 50, "guidance": 7.5}  # Stable Diffusion's own


class Pipeline:
    """Paints pictures from captions.

    configs: {"unet", "vae", "text_encoder", "scheduler": the contents of its config file}.
    params: {"unet", "vae", "text_encoder": {name: array}}, all on one device.
    defaults: any of steps, guidance and sampler; what a call uses where it says nothing.
    """

    def __init__(self, configs, params, tokenizer, defaults=None):
        self.configs, self.params, self.tokenizer = configs, params, tokenizer
        self.unet, self.vae, self.text_encoder = (
            COMPONENTS[name][1](configs[name]) for name in ("unet", "vae", "text_encoder")
        )
        self.schedule = Schedule(configs["scheduler"])
        self.scheduler_class = configs["scheduler"].get("_class_name", "DDIMScheduler")
        sampler = SCHEDULERS.get(self.scheduler_class, self.scheduler_class)
        self.defaults = DEFAULTS | {"sampler": sampler}
        self.defaults |= defaults or {}
        self.xp = array_module(next(iter(params["unet"].values())))

    @classmethod
    def load(cls, folder, device="cpu"):
        """Read a folder that tinyldm trained, or one of Stable Diffusion's.

        device: "cpu", or "cuda" for CuPy. Weights become float32.
        """
        folder = Path(folder)
        index = read_json(folder / "model_index.json")
        configs = {"scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}
        params = {}
        for name, (_, model, _) in COMPONENTS.items():
            configs[name] = read_json(folder / name / "config.json")
            weights = load_component(folder / name, model(configs[name]).shapes())
            params[name] = to_device(weights, device)
        tokenizer = Tokenizer.load(folder / "tokenizer")
        return cls(configs, params, tokenizer, index.get("_tinyldm"))

    def save(self, folder):
        """Write the folder; `model_index.json` comes last, so a folder that has it is whole."""
        folder = Path(folder)
        (folder / "model_index.json").unlink(missing_ok=True)
        index = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "_tinyldm": self.defaults,
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", self.scheduler_class],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
        for name, ((library, kind), _, file) in COMPONENTS.items():
            index[name] = [library, kind]
            note = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION}
            write_json(folder / name / "config.json", note | self.configs[name])
            weights = to_device(self.params[name], "cpu")
            save_weights(folder / name / file, weights, {"format": "pt"})
        write_json(folder / "scheduler" / "scheduler_config.json", self.configs["scheduler"])
        self.tokenizer.save(folder / "tokenizer")
        write_json(folder / "model_index.json", index)

    def __call__(
        self,
        prompt,
        *,
        negative_prompt="",
        steps=None,
        guidance=None,
        sampler=None,
        seed=0,
        size=None,
        latents=None,
    ):
        """Paint one picture a prompt: str or list of str → list of PIL images.

        negative_prompt: what guidance leads away from, one for all or one a prompt.
        steps, guidance (1 is none), sampler: None is the folder's default.
        seed: picture i starts from the noise of (seed, i), whatever the batch and the device.
        size: pixels, one number or (height, width); None is the size trained on.
        latents: (n, h, w, c) unit normal noise to start from instead.
        """
        *_, (x, _) = self.denoise(
            prompt, negative_prompt, steps, guidance, sampler, seed, size, latents
        )
        return [Image.fromarray(picture) for picture in self.decode(x)]

    def denoise(
        self,
        prompt,
        negative_prompt="",
        steps=None,
        guidance=None,
        sampler=None,
        seed=0,
        size=None,
        latents=None,
    ):
        """The reverse process, as a generator of (x, x0): latents so far, and where they lead.

        The arguments are those of a call, which decodes the last x.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        n = len(prompts)
        negatives = [negative_prompt] * n if isinstance(negative_prompt, str) else negative_prompt
        if n == 0 or len(negatives) != n:
            raise ValueError(f"expected one negative prompt, or one for each of {n} ≥ 1 prompts")
        steps = self.defaults["steps"] if steps is None else steps
        guidance = self.defaults["guidance"] if guidance is None else guidance
        if not math.isfinite(guidance):
            raise ValueError(f"guidance: expected a finite number, found {guidance}")
        name = sampler or self.defaults["sampler"]
        if name not in SAMPLERS:
            raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, found {name!r}")
        shape = self._latent_shape(n, size)
        streams = [np.random.default_rng((seed, i)) for i in range(n)]

        def noise():  # drawn on the host, so it is the same on any device
            drawn = [stream.standard_normal(shape[1:], dtype=np.float32) for stream in streams]
            return self.xp.asarray(np.stack(drawn))

        x = noise()  # drawn in any case: DDPM's later noise is the same with latents of your own
        if latents is not None:
            x = self.xp.asarray(latents, dtype=np.float32)
        if x.shape != shape:
            raise ValueError(f"latents: expected {shape}, found {x.shape}")
        context = self.embed(prompts)
        null_context = self.embed(negatives) if guidance != 1 else None
        predict = guided(self.predict, context, null_context, guidance)
        options = {"noise": noise} if name == "ddpm" else {}
        yield from SAMPLERS[name](predict, self.schedule, x, steps, **options)

    def predict(self, x, t, context):
        """The U-Net's prediction at latents x (n, h, w, c), one time step t, context (n, l, d)."""

        def part(x, context):
            t_ = self.xp.full(len(x), int(t))
            with no_grad():
                return self.unet(self.params["unet"], x, t_, context)[0]

        return map_batch(part, x, context)

    def embed(self, texts):
        """Texts → hidden states (n, l, d)."""
        with no_grad():
            ids = self.xp.asarray(self.tokenizer(texts))
            return self.text_encoder(self.params["text_encoder"], ids)[0]

    def decode(self, latents):
        """Latents (n, h, w, c) → pictures, uint8 (n, height, width, 3) on the host."""

        def part(x):
            with no_grad():
                return self.vae.from_latents(self.params["vae"], x)[0]

        return to_uint8(to_device(map_batch(part, latents), "cpu"))

    def encode(self, pictures):
        """Pictures, uint8 (n, height, width, 3) → the means of their latents (n, h, w, c)."""

        def part(x):
            with no_grad():
                return self.vae.to_latents(self.params["vae"], x)[0]

        return map_batch(part, self.xp.asarray(from_uint8(pictures)))

    @property
    def size(self):
        """(height, width) in pixels that the model was trained on."""
        side = self.unet.config.sample_size or 64
        h, w = side if isinstance(side, (list, tuple)) else (side, side)
        return h * self.vae.factor, w * self.vae.factor

    def _latent_shape(self, n, size):
        size = self.size if size is None else size
        sides = (size, size) if np.isscalar(size) else tuple(size)
        factor = self.vae.factor
        if len(sides) != 2 or not all(side >= 1 and side % factor == 0 for side in sides):
            found = "×".join(map(str, sides))
            raise ValueError(f"size: expected multiples of {factor}, found {found}")
        height, width = sides
        return n, height // factor, width // factor, self.unet.config.in_channels


def from_uint8(pictures):
    """0…255 → float32 in −1…1, the range of the autoencoder."""
    return pictures.astype(np.float32) / 127.5 - 1


def to_uint8(pictures):
    """−1…1 → 0…255, rounded and clipped. ValueError for what is not a number."""
    if not np.isfinite(pictures).all():
        raise ValueError("the picture holds values that are not finite: the weights have diverged")
    return np.clip(np.round((pictures + 1) * 127.5), 0, 255).astype(np.uint8)
