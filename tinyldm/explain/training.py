"""The chapter on training: samples on the way, losses, averaged weights against raw ones."""

import numpy as np
from PIL import Image

from tinyldm.checkpoints.components import COMPONENTS
from tinyldm.evaluation.metrics import floors_by_noise, loss_by_noise
from tinyldm.evaluation.plots import Curves
from tinyldm.evaluation.reverse import start_noise
from tinyldm.explain.subject import Contents, Subject, data_uri
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.metrics import read_metrics
from tinyldm.training.snapshots import MOST, losses_of
from tinyldm.training.state import load_state

WIDEST = 640  # pixels of a sheet of samples on the page


def training(subject: Subject, contents: Contents) -> None:
    """Show samples in the course of training, and images by averaged and by raw weights."""
    for name, curves in losses_of(subject.run).items():
        contents.plot(name, curves)
    found = (subject.run / "samples").glob("step-*.png")
    files = sorted(file for file in found if file.stem.removeprefix("step-").isdecimal())
    sheets = []
    for file in files:
        with Image.open(file) as image:
            small = image.convert("RGB")
        small.thumbnail((WIDEST, WIDEST))
        sheets.append(data_uri(small, lossless=False))
    contents.text("training-sheets", sheets)
    steps = [int(file.stem.partition("-")[2]) for file in files]
    contents.text("training-steps", [f"step {step:,}" for step in steps])
    entries = read_metrics(subject.run / "training" / "metrics.jsonl")
    rights = {e["step"]: e["right"] for e in entries if "right" in e}
    contents.text("training-right", [_said(rights.get(step)) for step in steps])
    average, raw = subject.pipeline, raw_pipeline(subject)
    if len(subject.held_out):
        some = subject.held_out.pick(range(min(MOST, len(subject.held_out))))
        bands = [loss_by_noise(one, some) for one in (average, raw)]
        losses = np.mean(bands, axis=1)
        text = "Their loss on held-out images: {:.4f} averaged, {:.4f} at the last step."
        contents.text("training-weights", [text.format(*losses)])
        _floor(subject.pipeline, some, bands[0], contents)
    start = start_noise(average, len(subject.prompts))
    for name, pipeline in (("average", average), ("raw", raw)):
        images = pipeline(subject.prompts, latents=start)
        contents.sheet(f"training-{name}", np.stack([np.asarray(i) for i in images])[:, None])


def _floor(pipeline, held_out, losses, contents):
    """Plot the loss on held-out images by noise, and the part of it that nobody can learn."""
    floors = floors_by_noise(pipeline, held_out.images)
    if floors is None:
        return
    width = len(pipeline.schedule) / len(floors)
    middles = [width * (band + 0.5) for band in range(len(floors))]
    series = {
        "held-out images": (middles, losses),
        "the latents' own noise": (middles, floors.mean(axis=1).tolist()),
    }
    title, y = "denoiser: its loss at the end, and the floor", "squared error of the prediction"
    contents.plot("loss-floor", Curves(series, title, "time step t", y, False))


def _said(right):
    """Say which share of the samples of a step is right, where a rule can read them."""
    if not right:
        return ""
    return "right: " + ", ".join(f"{name} {share:.0%}" for name, share in right.items())


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
