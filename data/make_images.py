"""Write data/images/ again: `python data/make_images.py RUN`, of a finished run of the demo.

It copies the run's images of the course, draws the plot of schedules and the diagram, and notes the
checksum of every image in manifest.json. The images of tasks and experiments, and the map of
gradients, have commands of their own, which README.md beside the images tells.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from tinyldm.checkpoints.components import make
from tinyldm.data.dataset import Dataset
from tinyldm.data.shapes import make_shapes
from tinyldm.evaluation.plots import save_plot
from tinyldm.experiments.schedules import noise_schedules
from tinyldm.explain.diagram import diagram
from tinyldm.explain.inside import blocks_of
from tinyldm.explain.subject import Subject
from tinyldm.models import Tokenizer
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.presets import PRESETS

FOLDER = Path(__file__).parent / "images"
OF_THE_RUN = (
    "data", "forward", "reconstructions", "samples", "words", "reverse", "guidance", "loss-by-noise"
)  # fmt: skip


def diagram_of_the_demo() -> str:
    """Draw the demo's networks, for which no weight needs to be trained."""
    images, captions = make_shapes(100, 32, 0)
    config = PRESETS["demo"]
    tokenizer = Tokenizer.train(captions, config.vocabulary, config.tokens)
    configs, rng = config.configs(tokenizer), np.random.default_rng(0)
    params = {name: make(name, configs[name]).init(rng) for name in ("unet", "vae", "text_encoder")}
    data = Dataset(images, captions, captions)
    pipeline = Pipeline(configs, params, tokenizer)
    return diagram(blocks_of(Subject(FOLDER, pipeline, data, data, captions[:1])), captions[0])


def sums() -> dict[str, str]:
    """Return {name: SHA-256} of all images."""
    files = sorted(file for file in FOLDER.iterdir() if file.suffix in (".png", ".svg"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    for name in OF_THE_RUN:
        shutil.copyfile(Path(sys.argv[1]) / "samples" / f"{name}.png", FOLDER / f"{name}.png")
    save_plot(FOLDER / "schedules.png", noise_schedules())
    (FOLDER / "diagram.svg").write_text(diagram_of_the_demo(), encoding="utf-8")
    text = json.dumps(sums(), indent=1) + "\n"
    (FOLDER / "manifest.json").write_text(text, encoding="utf-8")
