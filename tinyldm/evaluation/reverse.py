"""The reverse process step by step: what each step begins with, and what it guesses."""

from dataclasses import dataclass

import numpy as np

from tinyldm.backend import Array
from tinyldm.diffusion.samplers import SAMPLERS
from tinyldm.sampling import noise
from tinyldm.sampling.init_image import Scene
from tinyldm.sampling.pipeline import Pipeline


@dataclass
class Trajectory:
    """The reverse process of n images: what each step began with, and what it guessed.

    t, alphas_bar: (steps,), where steps begin. states, guesses: a list of (n, h, w, c) each, x_t
    and the x_0 that the step was made with. concat: concatenation conditioning (n, h, w, …), if
    there is any.
    """

    t: list[int]
    alphas_bar: list[float]
    states: list[Array]
    guesses: list[Array]
    concat: Array | None


def trajectory(
    pipeline: Pipeline,
    prompts: list[str],
    scene: Scene | None = None,
    start: Array | None = None,
) -> Trajectory:
    """Run the reverse process with the sampler of the model.

    scene: the input of a model with a task. start: (n, h, w, c), by default the noise of seed 0.
    """
    params = pipeline.sampling_params(prompts)
    if start is None:
        start = start_noise(pipeline, len(prompts), params.seed)
    passed = list(pipeline.denoise(params, start, scene))
    schedule = pipeline.schedule
    levels = SAMPLERS[params.sampler].levels(schedule, params.steps)[-len(passed) :]
    t = [int(abs(schedule.alphas_bar - level).argmin()) for level in levels]
    concat = scene and scene.concat_conditioning(
        pipeline.task, pipeline.to_latents, pipeline.vae.factor
    )
    states = [start, *(x for x, _ in passed[:-1])]
    return Trajectory(t, list(map(float, levels)), states, [x0 for _, x0 in passed], concat)


def start_noise(pipeline: Pipeline, n: int, seed: int = 0) -> Array:
    """Draw what a sample of this seed starts from, for n images: standard normal (n, h, w, c)."""
    h, w = (side // pipeline.vae.factor for side in pipeline.size)
    sides = h, w, pipeline.vae.latent_channels
    return pipeline.xp.asarray(noise.draw(noise.streams(seed, n), sides))


def guesses(pipeline: Pipeline, path: Trajectory, prompts: list[str]) -> np.ndarray:
    """Guess the clean images at each state of a trajectory, without guidance.

    → uint8 (steps, n, height, width, 3). prompts: n, others than the trajectory's if wished.
    """
    condition, found = pipeline.embed(prompts), []
    for x, t, alpha_bar in zip(path.states, path.t, path.alphas_bar, strict=True):
        prediction = pipeline.predict(x, t, condition, path.concat)
        found.append(pipeline.decode(pipeline.schedule.split(prediction, x, alpha_bar)[0]))
    return np.stack(found)
