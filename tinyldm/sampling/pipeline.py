"""The sampling pipeline: text → latents → image, from noise alone or from an init image."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyldm.backend import Array, array_module, to_device
from tinyldm.checkpoints.checkpoint import load_checkpoint
from tinyldm.checkpoints.components import make
from tinyldm.checkpoints.diffusers_folder import save_folder
from tinyldm.config import ConfigError, brief, meant
from tinyldm.data.images import both_sides, from_uint8, in_channels, similar_size, to_uint8
from tinyldm.diffusion.guidance import guided
from tinyldm.diffusion.samplers import SAMPLERS, Predict, sampler_of
from tinyldm.diffusion.schedule import Schedule
from tinyldm.diffusion.timesteps import check_steps
from tinyldm.files import shown
from tinyldm.machine import keep_freed_memory
from tinyldm.models import ClassNames, Tokenizer
from tinyldm.nn import no_grad
from tinyldm.nn.protocol import replaceable
from tinyldm.options import options_of, path_of
from tinyldm.sampling import noise
from tinyldm.sampling.init_image import Images, Scene, each, enter, strength_of, with_concat
from tinyldm.sampling.params import SamplingParams, check_array, texts
from tinyldm.sampling.tasks import task_of, times_larger
from tinyldm.sampling.tiling import in_parts
from tinyldm.threads import map_batch

DEFAULTS = {"steps": 50, "guidance": 7.5}  # Stable Diffusion's own
POSITIONS_AT_ONCE = 2**14  # of latents, on a core: more would need more memory, and be no faster
SAMPLES_AT_ONCE = 64
LARGEST_SIDE = 2**16  # pixels of an image, more than any memory holds
LARGEST_UPSCALED = 1024  # pixels, the longest side of an upscaled image without --size


class Pipeline:
    """Generates images from captions, or of classes.

    configs: {"unet", "vae", "text_encoder", "scheduler": the contents of its config file}.
    params: {"unet", "vae", "text_encoder": {name: array}}, all on one device.
    defaults: any of steps, guidance and sampler, for calls that do not set them. And task, where
    the number of channels does not determine it.

    There is no text_encoder where the U-Net embeds classes itself.
    """

    def __init__(
        self,
        configs: dict[str, dict],
        params: dict[str, dict[str, Array]],
        tokenizer: Tokenizer | ClassNames,
        defaults: dict | None = None,
    ):
        keep_freed_memory()
        self.configs, self.params, self.tokenizer = configs, params, tokenizer
        self.unet, self.vae, self.text_encoder = (
            make(name, configs[name]) if name in configs else None
            for name in ("unet", "vae", "text_encoder")
        )
        if (self.text_encoder is None) != bool(self.unet.class_embedding):
            raise ConfigError(
                "unet config: expected num_class_embeds without a text_encoder, or none with it"
            )
        # Schedulers that never clip do not write the key; others do, and latents are not pixels.
        self.schedule = Schedule({"clip_sample": False} | configs["scheduler"])
        self.scheduler_class = configs["scheduler"].get("_class_name", "DDIMScheduler")
        self.defaults = DEFAULTS | {"sampler": sampler_of(configs["scheduler"])}
        self.defaults |= defaults or {}
        channels, latents = self.unet.config.in_channels, self.vae.latent_channels
        self.task = task_of(channels, latents, self.defaults.get("task"))
        self.xp = array_module(next(iter(params["unet"].values())))

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "cpu", vae: str | Path | None = None
    ) -> "Pipeline":
        """Read a folder that tinyldm trained, or Stable Diffusion as a folder or in one file.

        device: "cpu", or "cuda" for CuPy. Weights become float32. vae: a folder or a file of an
        autoencoder to use instead. Raises FileNotFoundError or ValueError, in one line.
        """
        return cls(*load_checkpoint(folder, device, vae))

    def save(self, folder: str | Path) -> None:
        """Write the folder; `model_index.json` comes last, so a folder that has it is whole."""
        parts = self.configs, self.params, self.tokenizer
        save_folder(path_of("folder", folder), *parts, self.defaults, self.scheduler_class)

    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = "",
        size: int | tuple[int, int] | None = None,
        latents: Array | None = None,
        image: Images | None = None,
        mask: Images | None = None,
        callback: Callable[[int, Array, Array], None] | None = None,
        **options: float | str | None,
    ) -> list[Image.Image]:
        """Generate one image per prompt: str or list of str → list of PIL images.

        negative_prompt: what guidance leads away from, one for all or one per prompt; None is "".
        size: pixels, one integer or (height, width); None is the size trained on or, with an image,
        its aspect ratio.
        latents: (n, h, w, c) standard normal noise to start from instead.
        image: the init image, PIL, one for all or one per prompt. An upscaling model takes the
        low-resolution image, a layout model the map.
        mask: PIL; where it is white the image is generated, all the rest stays.
        callback: called with (i, x, x0) after the i-th step, both (n, h, w, c): the latents so far,
        and the clean latents predicted from them. What it raises ends the work.
        options: of SamplingParams, such as steps, guidance, sampler and seed; None or left out is
        the folder's default. Image i starts from the noise of (seed, i), whatever the batch and the
        device.
        Raises ValueError where one of them is not what is expected.
        """
        if callback is not None and not callable(callback):
            raise ValueError(f"callback: expected a function, found {brief(callback)}")
        first, prompt = None, texts("prompt", prompt)
        if image is not None and prompt:
            first, *_ = each("image", image, len(prompt))
        strength = strength_of(
            self.task, first is not None, mask is not None, options.pop("strength", None)
        )
        if first and size is None:
            size = self.size_like(first.height, first.width)
        params = self.sampling_params(prompt, negative_prompt, size, strength=strength, **options)
        scene = None if image is None else Scene.of(image, mask, params, self.task)
        for i, (x, x0) in enumerate(self.denoise(params, latents, scene)):
            if callback:
                callback(i, x, x0)
        return [Image.fromarray(image) for image in self.decode(x, params.tile)]

    def sampling_params(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = "",
        size: int | tuple[int, int] | None = None,
        **options: float | str | None,
    ) -> SamplingParams:
        """Check the arguments of a call and fill in the folder's defaults.

        options: of SamplingParams; None is the default.
        """
        prompts = texts("prompt", prompt)
        negatives = texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives *= len(prompts)  # one for all
        if unknown_names := options.keys() - options_of(SamplingParams):
            name = min(unknown_names)
            raise ValueError(f"{name}: no such option{meant(name, options_of(SamplingParams))}")
        defaults = {name: self.defaults[name] for name in ("steps", "guidance", "sampler")}
        given = {name: value for name, value in options.items() if value is not None}
        options = {"seed": 0} | defaults | given
        if options["sampler"] == self.scheduler_class:
            raise ValueError(
                f"sampler: the model names a {shown(self.scheduler_class):.60}, which is not "
                f"implemented; choose another (--sampler): {', '.join(SAMPLERS)}"
            )
        if isinstance(options["steps"], Integral):
            check_steps(self.schedule, options["steps"])
        params = SamplingParams(prompts, negatives, *self._sides(size), **options)
        self.check_tile(params.tile)
        return params

    def denoise(
        self,
        params: SamplingParams,
        latents: Array | None = None,
        scene: Scene | None = None,
    ) -> Iterator[tuple[Array, Array]]:
        """Run the reverse process: yields (x, x0), the latents so far and the clean ones predicted.

        Both are (n, h, w, c). latents: unit normal noise to start from instead of the params'.
        scene: the init image, where the params have a strength.
        """
        n, f = len(params.prompts), self.vae.factor
        h, w = params.height // f, params.width // f
        sides = h, w, self.vae.latent_channels
        streams = noise.streams(params.seed, n)
        if params.variation is not None:  # all of them start from, and draw, the noise of the first
            streams = [noise.streams(params.seed, 1)[0] for _ in range(n)]

        def fresh():
            return self.xp.asarray(noise.draw(streams, sides))

        x = fresh()  # in any case: so DDPM's later noise is the same with given latents
        if params.variation is not None:
            ways = noise.draw(noise.variation_streams(params.variation_seed, n), sides)
            first = to_device(x, "cpu")
            x = self.xp.asarray(noise.slerp(first, ways, params.variation))
        if latents is not None:
            x = noise.given(self.xp, latents, x.shape)
        sampler = SAMPLERS[params.sampler]
        alphas_bar = sampler.levels(self.schedule, params.steps)
        to_latents = partial(self.to_latents, tile=params.tile)
        entry = enter(params, scene, x, alphas_bar, to_latents, f, self.task)
        options = entry.options | ({"noise": fresh} if sampler.needs_noise else {})
        context = self.embed(params.prompts)
        if params.guidance != 1:
            context = self.xp.concatenate([self.embed(params.negative_prompts), context])
        with self.predictor(context, max(1, POSITIONS_AT_ONCE // (h * w))) as predict:
            if entry.concat is not None:
                predict = with_concat(predict, entry.concat)
            if params.guidance != 1:
                predict = guided(predict, params.guidance, params.rescale)
            yield from sampler(predict, self.schedule, entry.x, params.steps, **options)

    def predict(
        self, x: Array, t: int | np.ndarray, condition: Array, concat: Array | None = None
    ) -> Array:
        """Return the U-Net's prediction at latents x (n, h, w, c), for a condition of `embed`.

        t: the time step, one for all or (n,) on the host. concat: concatenated to x, (n, h, w, …).
        """
        t = self.xp.asarray(t) if np.ndim(t) else self.xp.full(len(x), int(t))
        if concat is not None:
            x = self.xp.concatenate([x, concat], axis=-1)
        return map_batch(self._unet, x, t, condition)

    def _unet(self, x, t, condition):
        named = "context" if self.text_encoder else "labels"
        with no_grad():
            return self.unet(self.params["unet"], x, t, **{named: condition})[0]

    def predictor(
        self, condition: Array, at_once: int = SAMPLES_AT_ONCE
    ) -> AbstractContextManager[Predict]:
        """Make a `predict` for many steps with one condition (n, …): yields (x, t) → prediction.

        What depends on a text alone is cached at the first step. at_once: samples on a core.
        """
        return predictor(self._unet, condition, at_once)

    def embed(self, prompts: str | Sequence[str]) -> Array:
        """Embed texts as the U-Net takes them: hidden states (n, l, d), or labels (n,)."""
        ids = self.xp.asarray(self.tokenizer(texts("prompts", prompts)))
        if self.text_encoder is None:
            return ids
        with no_grad():
            return self.text_encoder(self.params["text_encoder"], ids)[0]

    def decode(self, latents: Array, tile: int | None = None) -> np.ndarray:
        """Decode latents (n, h, w, c) → images, uint8 (n, height, width, 3) on the host.

        tile: pixels, the side of the tiles in which to decode, for less memory; 0 never, None where
        the images are large.
        """

        def part(x):
            with no_grad():
                return self.vae.from_latents(self.params["vae"], x)[0]

        self.check_tile(tile)
        check_array("latents", latents, "f", "numbers (n, h, w, c)")
        images = in_parts(part, latents, latents.shape[1:3], self.vae.factor, tile)
        return to_uint8(to_device(images, "cpu"))

    def check_tile(self, tile: int | None) -> None:
        """Raise ValueError for tiles that are too small to be of use."""
        least = 8 * self.vae.factor
        if tile is not None and (not isinstance(tile, Integral) or 0 != tile < least):
            found = f"found {brief(tile)}"
            raise ValueError(f"tile: expected 0, for none, or {least} pixels or more, {found}")

    def encode(self, images: np.ndarray, tile: int | None = None) -> Array:
        """Encode images, uint8 (n, height, width, 3) → the means of their latents (n, h, w, c).

        tile: as for `decode`.
        """
        check_array("images", images, "u", "uint8 (n, height, width, 3)")
        return self.to_latents(from_uint8(images), tile)

    def to_latents(self, pixels: np.ndarray, tile: int | None = None) -> Array:
        """Encode pixels in −1…1 → the means of their latents; tile: as for `decode`."""
        pixels = in_channels(pixels, self.vae.config.in_channels)

        def part(x):
            with no_grad():
                return self.vae.to_latents(self.params["vae"], x)[0]

        self.check_tile(tile)
        grid = tuple(side // self.vae.factor for side in pixels.shape[1:3])
        return in_parts(part, self.xp.asarray(pixels), grid, self.vae.factor, tile)

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) in pixels that the model was trained on."""
        h, w = both_sides(self.unet.config.sample_size or 64)
        return h * self.vae.factor, w * self.vae.factor

    def size_like(self, height: int, width: int) -> tuple[int, int]:
        """Return a size for an image of these proportions, which the U-Net can halve evenly.

        For an upscaling model it is the size of the upscaled image: ValueError above 1024
        pixels of a side.
        """
        times, factor = times_larger(self.task), self.vae.factor
        if times > 1:
            like, multiple = (times * height, times * width), math.lcm(factor, times)
        else:
            like, multiple = self.size, factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        size = similar_size((height, width), like, multiple)
        if times > 1 and max(size) > LARGEST_UPSCALED:
            raise ValueError(
                f"image: {height}×{width} pixels would become {size[0]}×{size[1]}; give a smaller "
                "one, or set --size"
            )
        return size

    def _sides(self, size):
        several = isinstance(size, (list, tuple, np.ndarray))
        sides = self.size if size is None else tuple(size) if several else (size, size)
        if len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
            raise ValueError(f"size: expected pixels, one or (height, width), found {brief(size)}")
        if max(sides) > LARGEST_SIDE:
            raise ValueError(f"size: expected at most {LARGEST_SIDE:,} pixels, found {brief(size)}")
        factor = math.lcm(self.vae.factor, times_larger(self.task))
        if not all(side >= 1 and side % factor == 0 for side in sides):
            found = "×".join(map(str, sides))
            near = "×".join(str(max(1, round(side / factor)) * factor) for side in sides)
            raise ValueError(
                f"size: expected multiples of {factor}, found {found}; the nearest is {near}"
            )
        return sides


@replaceable
@contextlib.contextmanager
def predictor(
    network: Callable[[Array, Array, Any], Array], condition: Array, at_once: int
) -> Iterator[Predict]:
    """Yield (x, t) → `network(x, t (n,), condition)`, for many steps with one condition (n, …).

    at_once: how many samples a core may hold at a time.
    """

    def predict(x, t):
        return network(x, array_module(x).full(len(x), t), condition)

    yield predict
