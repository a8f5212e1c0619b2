"""The recipes of CONTRIBUTING.md, followed to the letter."""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from small_model import PROMPTS, generate, make_pipeline

from tinyldm.diffusion import samplers
from tinyldm.diffusion.samplers import SAMPLERS, Sampler
from tinyldm.diffusion.timesteps import levels_of_timesteps
from tinyldm.testing import check_sampler

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def code_of(title):
    """The code of a recipe, run where the recipe says that it is written."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## )", TEXT, re.DOTALL | re.MULTILINE)[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_a_sampler(monkeypatch):
    names = dict(vars(samplers))
    exec(code_of("Add a sampler"), names)
    mine = Sampler(names["ddim_like"], "DDIMScheduler", levels_of_timesteps)
    schedule = samplers.Schedule({"clip_sample": False})

    def sample(predict, x, steps):
        *_, (x, _) = mine(lambda x, t: predict(x, int(t)), schedule, x, steps)
        return x

    check_sampler(sample, schedule.alphas_bar, order=1)
    pipe = make_pipeline()
    image = Image.fromarray(np.full((16, 16, 3), 120, np.uint8))
    for options in ({}, {"image": image, "strength": 0.6}):
        expected = generate(pipe, PROMPTS[0], sampler="ddim", steps=10, **options)
        with monkeypatch.context() as patch:
            patch.setitem(SAMPLERS, "ddim", mine)
            found = generate(pipe, PROMPTS[0], sampler="ddim", steps=10, **options)
        assert abs(found.astype(int) - expected).mean() < 0.5  # its last ᾱ is 1
