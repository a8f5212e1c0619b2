"""Text → latents → picture, and the folder that a model lives in.

The folder is diffusers' own layout (`model_index.json`, one sub-folder a component), whether
tinyldm trained the model or somebody else did, and diffusers loads what tinyldm saves.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm.backend import Array, array_module, cores, map_batch, map_threads, to_device
from tinyldm.config import unknown
from tinyldm.diffusion.samplers import RANDOM, SAMPLERS, guided, timesteps
from tinyldm.diffusion.schedule import Schedule
from tinyldm.files import read_json, write_json
from tinyldm.machine import keep_freed_memory
from tinyldm.models import AutoencoderKL, TextEncoder, Tokenizer, UNet
from tinyldm.models.context import FixedContext
from tinyldm.models.weights import load_component, save_weights
from tinyldm.nn import no_grad
from tinyldm.team import available, team

COMPONENTS = {  # folder → (library and class that diffusers loads, our class, file of weights)
    "unet": (("diffusers", "UNet2DConditionModel"), UNet, "diffusion_pytorch_model.safetensors"),
    "vae": (("diffusers", "AutoencoderKL"), AutoencoderKL, "diffusion_pytorch_model.safetensors"),
    "text_encoder": (("transformers", "CLIPTextModel"), TextEncoder, "model.safetensors"),
}
SCHEDULERS = {  # diffusers' class → our sampler
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm++2m",
}
DIFFUSERS_VERSION = "0.32.0"  # whose file formats these are
SAMPLES_AT_ONCE = 64  # on a core: more would need more memory, and be no faster
DEFAULTS = {"steps": 50, "guidance": 7.5}  # Stable Diffusion's own


class Pipeline:
    """Paints pictures from captions.

    configs: {"unet", "vae", "text_encoder", "scheduler": the contents of its config file}.
    params: {"unet", "vae", "text_encoder": {name: array}}, all on one device.
    defaults: any of steps, guidance and sampler; what a call uses where it says nothing.
    """

    def __init__(
        self,
        configs: dict[str, dict],
        params: dict[str, dict[str, Array]],
        tokenizer: Tokenizer,
        defaults: dict | None = None,
    ):
        keep_freed_memory()
        self.configs, self.params, self.tokenizer = configs, params, tokenizer
        self.unet, self.vae, self.text_encoder = (
            COMPONENTS[name][1](configs[name]) for name in ("unet", "vae", "text_encoder")
        )
        self.schedule = Schedule(configs["scheduler"])
        self.scheduler_class = configs["scheduler"].get("_class_name", "DDIMScheduler")
        sampler = SCHEDULERS.get(self.scheduler_class, self.scheduler_class)
        if sampler == "dpm++2m" and configs["scheduler"].get("algorithm_type", "")[:3] == "sde":
            sampler = "dpm++2m_sde"
        self.defaults = DEFAULTS | {"sampler": sampler}
        self.defaults |= defaults or {}
        self.xp = array_module(next(iter(params["unet"].values())))

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "Pipeline":
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

    def save(self, folder: str | Path) -> None:
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
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] = "",
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        latents: Array | None = None,
    ) -> list[Image.Image]:
        """Paint one picture a prompt: str or list of str → list of PIL images.

        negative_prompt: what guidance leads away from, one for all or one a prompt.
        steps, guidance (1 is none), sampler: None is the folder's default.
        seed: picture i starts from the noise of (seed, i), whatever the batch and the device.
        size: pixels, one number or (height, width); None is the size trained on.
        latents: (n, h, w, c) unit normal noise to start from instead.
        ValueError where one of them is not what is expected.
        """
        recipe = self.recipe(prompt, negative_prompt, steps, guidance, sampler, seed, size)
        *_, (x, _) = self.denoise(recipe, latents)
        return [Image.fromarray(picture) for picture in self.decode(x)]

    def recipe(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
    ) -> "Recipe":
        """The arguments of a call, checked, with the folder's defaults filled in."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        n = len(prompts)
        negatives = [negative_prompt] * n if isinstance(negative_prompt, str) else negative_prompt
        if n == 0:
            raise ValueError("prompt: expected at least one")
        if len(negatives) != n:
            raise ValueError(f"negative_prompt: expected one, or {n}, found {len(negatives)}")
        steps = self.defaults["steps"] if steps is None else steps
        timesteps(self.schedule, steps)  # raises where there are not so many
        guidance = self.defaults["guidance"] if guidance is None else guidance
        if not math.isfinite(guidance):
            raise ValueError(f"guidance: expected a finite number, found {guidance}")
        sampler = sampler or self.defaults["sampler"]
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: {unknown(sampler, SAMPLERS)}")
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, found {seed}")
        height, width = self._sides(size)
        return Recipe(
            tuple(prompts), tuple(negatives), steps, guidance, sampler, seed, height, width
        )

    def denoise(
        self, recipe: "Recipe", latents: Array | None = None
    ) -> Iterator[tuple[Array, Array]]:
        """The reverse process, as a generator of (x, x0): latents so far, and where they lead.

        Both are (n, h, w, c). latents: unit normal noise to start from instead of the recipe's.
        """
        f = self.vae.factor
        sides = recipe.height // f, recipe.width // f, self.unet.config.in_channels
        streams = [np.random.default_rng((recipe.seed, i)) for i in range(len(recipe.prompts))]

        def noise():  # drawn on the host, so it is the same on any device
            drawn = [stream.standard_normal(sides, dtype=np.float32) for stream in streams]
            return self.xp.asarray(np.stack(drawn))

        x = noise()  # drawn in any case: DDPM's later noise is the same with latents of your own
        if latents is not None:
            if latents.shape != x.shape:
                raise ValueError(f"latents: expected {x.shape}, found {latents.shape}")
            x = self.xp.asarray(latents, dtype=np.float32)
        context = self.embed(recipe.prompts)
        if recipe.guidance != 1:
            context = self.xp.concatenate([self.embed(recipe.negatives), context])
        options = {"noise": noise} if recipe.sampler in RANDOM else {}
        with self.predictor(context) as predict:
            if recipe.guidance != 1:
                predict = guided(predict, recipe.guidance)
            sampler = SAMPLERS[recipe.sampler]
            yield from sampler(predict, self.schedule, x, recipe.steps, **options)

    def predict(self, x: Array, t: int | np.ndarray, context: Array) -> Array:
        """The U-Net's prediction at latents x (n, h, w, c), context (n, l, d).

        t: the time step, one for all or (n,) on the host.
        """
        t = self.xp.asarray(t) if np.ndim(t) else self.xp.full(len(x), int(t))

        def part(x, t, context):
            with no_grad():
                return self.unet(self.params["unet"], x, t, context)[0]

        return map_batch(part, x, t, context)

    @contextlib.contextmanager
    def predictor(self, context: Array) -> Iterator[Callable[[Array, int], Array]]:
        """`predict` for many steps with the same context (n, l, d): yields (x, t) → prediction.

        What depends on the context alone is made at the first step. On the CPU all cores share the
        samples, as processes where there can be any.
        """
        n, on_cpu = len(context), self.xp is np
        processes = available() if on_cpu else 1
        workers = min(n, processes if processes > 1 else cores() if on_cpu else 1)
        count = min(n, -(-n // (SAMPLES_AT_ONCE * workers)) * workers)
        bounds = [n * i // count for i in range(count + 1)]
        spans = [slice(*bounds[i : i + 2]) for i in range(count)]
        contexts = [FixedContext(context[span]) for span in spans]

        def part(i, x, t):
            with no_grad():
                t = self.xp.full(len(x), t)
                return self.unet(self.params["unet"], x, t, contexts[i])[0]

        with contextlib.ExitStack() as stack:
            if processes > 1 and workers > 1:
                share = stack.enter_context(team(part, workers))
            elif on_cpu:
                share = partial(map_threads, lambda item: part(*item))
            else:
                share = partial(map, lambda item: part(*item))

            def predict(x, t):
                work = [(i, x[span], t) for i, span in enumerate(spans)]
                rounds = [work[i : i + workers] for i in range(0, count, workers)]
                return self.xp.concatenate([y for some in rounds for y in share(some)])

            yield predict

    def embed(self, texts: Sequence[str]) -> Array:
        """Texts → hidden states (n, l, d)."""
        with no_grad():
            ids = self.xp.asarray(self.tokenizer(texts))
            return self.text_encoder(self.params["text_encoder"], ids)[0]

    def decode(self, latents: Array) -> np.ndarray:
        """Latents (n, h, w, c) → pictures, uint8 (n, height, width, 3) on the host."""

        def part(x):
            with no_grad():
                return self.vae.from_latents(self.params["vae"], x)[0]

        return to_uint8(to_device(map_batch(part, latents), "cpu"))

    def encode(self, pictures: np.ndarray) -> Array:
        """Pictures, uint8 (n, height, width, 3) → the means of their latents (n, h, w, c)."""

        def part(x):
            with no_grad():
                return self.vae.to_latents(self.params["vae"], x)[0]

        return map_batch(part, self.xp.asarray(from_uint8(pictures)))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained on."""
        side = self.unet.config.sample_size or 64
        h, w = side if isinstance(side, (list, tuple)) else (side, side)
        return h * self.vae.factor, w * self.vae.factor

    def _sides(self, size):
        size = self.size if size is None else size
        sides = (size, size) if np.isscalar(size) else tuple(size)
        factor = self.vae.factor
        if len(sides) != 2 or not all(side >= 1 and side % factor == 0 for side in sides):
            found = "×".join(map(str, sides))
            near = "×".join(str(max(1, round(side / factor)) * factor) for side in sides)
            raise ValueError(
                f"size: expected multiples of {factor}, found {found}; the nearest is {near}"
            )
        return sides

    def fingerprint(self) -> str:
        """A hash of weights, configs and tokenizer, in hexadecimal: equal hash, equal model."""

        def digest(named):
            component, name = named
            weights = np.ascontiguousarray(to_device(self.params[component][name], "cpu"))
            return hashlib.sha256(weights).hexdigest()

        names = [(component, name) for component in COMPONENTS for name in self.params[component]]
        parts = dict(zip(map("/".join, names), map_threads(digest, names), strict=True))
        tokenizer = self.tokenizer
        parts["tokenizer"] = [
            tokenizer.vocab,
            tokenizer.merges,
            tokenizer.max_length,
            tokenizer.pad_token,
        ]
        for component, config in self.configs.items():
            parts[component] = {k: v for k, v in config.items() if not k.startswith("_")}
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Recipe:
    """Everything that a batch of pictures depends on, beside the weights."""

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    steps: int
    guidance: float
    sampler: str
    seed: int
    height: int  # pixels
    width: int


def from_uint8(pictures: np.ndarray) -> np.ndarray:
    """0…255 → float32 in −1…1, the range of the autoencoder."""
    return pictures.astype(np.float32) / 127.5 - 1


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """−1…1 → 0…255, rounded and clipped. ValueError for what is not a number."""
    if not np.isfinite(pictures).all():
        raise ValueError("the picture holds values that are not finite: the weights have diverged")
    return np.clip(np.round((pictures + 1) * 127.5), 0, 255).astype(np.uint8)
