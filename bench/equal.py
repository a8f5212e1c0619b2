"""Stage 2 of a run once more, here and in PyTorch, for equal time: what has each learnt?

    python -m bench equal runs/demo [--seconds S] [--captions N]

Both begin with the run's first stage and the same fresh U-Net and text encoder. They see the same
batches in the same order, take the same steps of Muon and AdamW, and average the weights alike. The
learning rate follows the share of the time that has passed. Reading the images and encoding them is
not counted, nor is PyTorch's import.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tinyldm.data.dataset import Dataset
from tinyldm.data.shapes import make_shapes
from tinyldm.evaluation.metrics import SEED, loss_by_noise
from tinyldm.evaluation.reader import score
from tinyldm.evaluation.scenes import generate
from tinyldm.nn.optim import (
    BETA1,
    BETA2,
    ITERATIONS,
    MAX_NORM,
    MOMENTUM,
    QUINTIC,
    ema_decay,
    is_inner,
    learning_rate,
    stretch,
)  # fmt: skip
from tinyldm.nn.protocol import Params
from tinyldm.training.config import STAGES, Stage
from tinyldm.training.networks import Models
from tinyldm.training.preparation import load_data, split
from tinyldm.training.stages import Run, export, second_stage
from tinyldm.training.state import load_state
from tinyldm.training.step import stage_gradient, train_step


def main() -> None:
    """Parse the command line, train both, print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("command", choices=["equal"])
    parser.add_argument("run", type=Path, help="folder of a finished run on shapes")
    parser.add_argument("--seconds", type=float, default=222.0, help="of training, for each")
    parser.add_argument("--captions", type=int, default=250, help="to generate, of each kind")
    options = parser.parse_args()
    print("| trained by | steps | loss by noise, held-out images | right, seen | right, held out |")
    print("|---|---|---|---|---|")
    for name, train in {"tinyldm": ours, "PyTorch": theirs}.items():
        # A process of its own: nothing that one side asks of the C library reaches the other.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            average, steps = pool.submit(train, options.run, options.seconds).result()
        losses, shares = scores(options.run, average, options.captions)
        by_noise = " ".join(f"{loss:.3f}" for loss in losses)
        right = " | ".join(f"{share:.1%}" for share in shares)
        print(f"| {name} | {steps:,} | {by_noise} | {right} |", flush=True)


def begin(folder: Path) -> tuple[Run, Dataset]:
    """Return a run that is about to begin stage 2, and its held-out images."""
    done = load_state(folder)
    training, held_out = split(load_data(done.config), done.config)
    models = Models(done.config, done.tokenizer)
    state = second_stage(models, done.first_stage, training, done.data, "cpu", lambda line: None)
    return Run(folder, state, models, training, held_out, "cpu", lambda line: None), held_out


def for_seconds(seconds: float, stage: Stage, take_step: Callable[[int, float], None]) -> int:
    """Take steps, `take_step(number, learning rate)`, for so long → how many they were."""
    started, step, share = time.monotonic(), 0, 0.0
    while share < 1:
        total = int(step / share) if step > stage.warmup else 10**9
        take_step(step, learning_rate(step, total, stage.rate, stage.warmup, stage.decay))
        step += 1
        share = (time.monotonic() - started) / seconds
    return step


def ours(folder: Path, seconds: float) -> tuple[Params, int]:
    """Train here → the averaged weights, and the number of steps."""
    run, _ = begin(folder)
    state, job = run.state, run.job()
    stage = getattr(state.config, STAGES[1])
    with stage_gradient(job.loss_fn, state, 1, {}) as gradient_of:

        def take_step(step, rate):
            train_step(state, gradient_of, job.batch_at(step), rate, stage.ema)
            state.step += 1

        steps = for_seconds(seconds, stage, take_step)
    return {name: w.copy() for name, w in state.average.items()}, steps


def theirs(folder: Path, seconds: float) -> tuple[Params, int]:
    """Train in PyTorch, with diffusers and transformers → the same."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from bench import peer

    run, _ = begin(folder)
    config, models, job = run.state.config, run.models, run.job()
    stage = getattr(config, STAGES[1])
    configs = config.configs(models.tokenizer)
    fresh = {name: w.copy() for name, w in run.state.params.items()}
    of_unet = {name: fresh[name] for name in models.unet.shapes()}
    unet = peer.load(peer.UNet2DConditionModel, configs["unet"], of_unet, "contiguous", "cpu")
    text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    params = dict(unet.named_parameters())
    for name, w in text.named_parameters():
        params[name if name in fresh else f"text_model.{name}"] = w  # newer versions leave it out
    for name in models.text.shapes():
        params[name].data.copy_(torch.from_numpy(fresh[name]))
    inner = [name for name in params if is_inner(name, fresh[name])]
    outer = [params[name] for name in params if name not in set(inner)]
    adamw = torch.optim.AdamW(
        [
            {"params": [w for w in outer if w.ndim > 1], "weight_decay": 0.01},
            {"params": [w for w in outer if w.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(BETA1, BETA2), fused=True,
    )  # fmt: skip
    by_shape = {}
    for name in inner:
        by_shape.setdefault(params[name].shape, []).append(params[name])
    groups = [
        (
            weights,
            torch.zeros(len(weights), *shape),
            stretch(peer.to_numpy(weights[0], peer.KERNEL)),
        )
        for shape, weights in by_shape.items()
    ]
    average = {name: w.detach().clone() for name, w in params.items()}

    def muon(size):
        for weights, momentum, factor in groups:
            g = (1 - MOMENTUM) * torch.stack([w.grad for w in weights])
            momentum.mul_(MOMENTUM).add_(g)
            x = (g + MOMENTUM * momentum).flatten(2) if g.ndim == 5 else g + MOMENTUM * momentum
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            turned = x.shape[1] > x.shape[2]
            x = x.mT if turned else x
            for _ in range(ITERATIONS):
                square = x @ x.mT
                x = QUINTIC[0] * x + (QUINTIC[1] * square + QUINTIC[2] * square @ square) @ x
            x = (x.mT if turned else x).reshape(g.shape)
            torch._foreach_add_(weights, list(x), alpha=-size * factor)

    def take_step(step, rate):
        z, noise, ids, t = job.batch_at(step)
        x = peer.tensor(models.schedule.add_noise(z, noise, t), "contiguous")
        target = peer.tensor(models.schedule.target(z, noise, t), "contiguous")
        for w in params.values():
            w.grad = None
        context = text(torch.from_numpy(ids)).last_hidden_state
        error = unet(x, torch.from_numpy(t), context).sample - target
        error.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(params.values(), MAX_NORM)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        with torch.no_grad():
            muon(stage.muon * rate / stage.rate)
            kept = ema_decay(step, stage.ema)
            torch._foreach_lerp_(list(average.values()), list(params.values()), 1 - kept)

    steps = for_seconds(seconds, stage, take_step)
    kernels = {name: peer.to_numpy(w, peer.KERNEL) for name, w in average.items()}
    return {name: np.ascontiguousarray(w) for name, w in kernels.items()}, steps


def scores(folder: Path, average: Params, count: int) -> tuple[list[float], list[float]]:
    """Score weights → loss by noise on held-out images; shares of captions right, two of them."""
    run, held_out = begin(folder)
    run.state.average = average
    with TemporaryDirectory() as temporary:
        pipeline = export(Path(temporary), run.state, run.models)
    shares = []
    for held in (False, True):  # pairs of shape and colour that were trained on, and others
        _, captions = make_shapes(count, pipeline.size[0], SEED, held)
        parts = [captions[i : i + 50] for i in range(0, count, 50)]
        images = np.concatenate([generate(pipeline, part) for part in parts])
        shares.append(score(images, captions)["all"])
    return loss_by_noise(pipeline, held_out.pick(range(min(256, len(held_out))))), shares
