"""The chapter on training: samples on the way, losses, averaged weights against raw ones."""

import numpy as np
from PIL import Image

from tinyldm.checkpoints.components import COMPONENTS
from tinyldm.evaluation.reverse import start_noise
from tinyldm.explain.subject import Contents, Subject, data_uri
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.snapshots import losses_of
from tinyldm.training.state import load_state

WIDEST = 640  # pixels of a sheet of samples on the page


def training(subject: Subject, contents: Contents) -> None:
    """Show samples in the course of training, and images by averaged and by raw weights."""
    for name, curves in losses_of(subject.run).items():
        contents.plot(name, curves)
    files = sorted((subject.run / "samples").glob("step-*.png"))
    sheets = []
    for file in files:
        with Image.open(file) as image:
            small = image.convert("RGB")
        small.thumbnail((WIDEST, WIDEST))
        sheets.append(data_uri(small, lossless=False))
    contents.text("training-sheets", sheets)
    contents.text("training-steps", [f"step {int(file.stem.split('-')[1]):,}" for file in files])
    average, raw = subject.pipeline, raw_pipeline(subject)
    start = start_noise(average, len(subject.prompts))
    for name, pipeline in (("average", average), ("raw", raw)):
        images = pipeline(subject.prompts, latents=start)
        contents.sheet(f"training-{name}", np.stack([np.asarray(i) for i in images])[:, None])


def raw_pipeline(subject: Subject) -> Pipeline:
    """Return the pipeline with the weights of the last step in place of their moving average."""
    pipeline, state = subject.pipeline, load_state(subject.run)
    params = dict(pipeline.params)
    for component in COMPONENTS:
        if component != "vae" and component in params:
            params[component] = {
                name: pipeline.xp.asarray(state.params[name]) for name in params[component]
            }
    return Pipeline(pipeline.configs, params, pipeline.tokenizer, pipeline.defaults)
