"""Noise schedules: which one, and what should the network predict?

The same U-Net is trained on the same first stage from the same start, on the same batches and for
as many steps: with each schedule and each prediction, and two of them with the weights of Hang et
al. 2023. Their losses measure different things and do not compare; their samples do. So the
captions that are right are counted, by rule, for pairs of colour and shape seen in training and
for held-out ones. Zero terminal SNR (Lin et al. 2023) is tried with v alone: at its end a
prediction of ε does not determine the image, and the schedule refuses it.
"""

import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from tinyldm.data.shapes import make_shapes
from tinyldm.diffusion.schedule import PREDICTIONS, Schedule
from tinyldm.evaluation.figures import curves, grid, save_image
from tinyldm.evaluation.metrics import SEED
from tinyldm.evaluation.scenes import generate
from tinyldm.experiments.scoring import Report, accuracy
from tinyldm.training.config import SCHEDULES, STAGES
from tinyldm.training.estimate import estimate_run
from tinyldm.training.loop import Job, fit
from tinyldm.training.networks import Models, denoiser_loss
from tinyldm.training.preparation import Say, fit_tokenizer, load_data, remove, split
from tinyldm.training.presets import PRESETS
from tinyldm.training.run import Run, second_stage
from tinyldm.training.signals import Interruptible
from tinyldm.training.state import State, save_state

BASE = PRESETS["demo"]
TRIALS = [  # schedule, prediction, weighting
    *product(("linear", "scaled_linear", "cosine"), PREDICTIONS, ("simple",)),
    ("zero_snr", "v_prediction", "simple"),
    ("linear", "epsilon", "min-snr"),
    ("linear", "v_prediction", "min-snr"),
]
CAPTIONS = 200  # of pairs seen in training, and as many of held-out ones
SHOWN = 9  # in a row of the sheet
COLUMNS = {
    "schedule": ("schedule", ""),
    "prediction": ("prediction", ""),
    "weighting": ("weighting", ""),
    "steps": ("steps", ",d"),
    "seconds": ("seconds", ".0f"),
    "accuracy_seen": ("captions right", ".1%"),
    "accuracy_held_out": ("of held-out pairs", ".1%"),
}


def run(seconds: float, out: Path, say: Say) -> list[dict]:
    """Run all trials; writes results.json, table.md, signal-to-noise.png, samples.png; → rows."""
    data = load_data(BASE)
    images = split(data, BASE)
    tokenizer, base = fit_tokenizer(BASE, data.captions, say)
    lengths = {"steps": None, "seconds": seconds}
    base = replace(base, **{name: replace(getattr(base, name), **lengths) for name in STAGES})
    steps = estimate_run(base, len(images[0])).steps
    stages = {name: replace(getattr(base, name), steps=n) for name, n in steps.items()}
    base = replace(base, **stages)
    fingerprint, models = data.fingerprint(), Models(base, tokenizer)

    def begin(state, models):
        config = state.config
        names = config.schedule, config.prediction, config.weighting
        folder = out / ("first-stage" if state.stage == STAGES[0] else "-".join(names))
        remove(folder)
        save_state(folder, state)
        return Run(folder, state, models, *images, "cpu", say)

    prompts = {
        name: make_shapes(CAPTIONS, base.side, SEED, held_out=name == "held_out")[1]
        for name in ("seen", "held_out")
    }
    sheet = []
    with Interruptible() as stop:
        report = Report(out, COLUMNS, stop)
        params = models.vae.init(np.random.default_rng((base.seed, 0)))
        first = begin(State(base, STAGES[0], params, tokenizer, fingerprint), models)
        first.fit_autoencoder(stop)
        first_stage, batch_at = dict(first.state.average), None
        for schedule, prediction, weighting in TRIALS:
            trial = {"schedule": schedule, "prediction": prediction, "weighting": weighting}
            models = Models(replace(base, **trial), tokenizer)
            say(", ".join(trial.values()))
            state = second_stage(
                models.config, models, first_stage, images[0], fingerprint, 0, "cpu", say
            )
            one = begin(state, models)
            batch_at = batch_at or one.latent_batches()[0]
            started = time.monotonic()
            fit(one.folder, state, Job(denoiser_loss(models), batch_at, say), stop)
            row = trial | {"steps": state.step, "seconds": time.monotonic() - started}
            pipeline = one.export()
            for name, captions in prompts.items():
                generated = generate(pipeline, captions, seed=SEED)
                row[f"accuracy_{name}"] = accuracy(generated, captions)
                if name == "seen":
                    sheet.append(generated[:SHOWN])
            report.add(row)
            say(f"{row['accuracy_seen']:.1%} of the captions are right")
    labels = ["\n".join(trial) for trial in TRIALS]
    save_image(
        out / "samples.png", grid(np.concatenate(sheet), columns=len(sheet[0]), labels=labels)
    )
    title = "signal to noise against the time step"
    save_image(out / "signal-to-noise.png", curves(signal_to_noise(), title))
    return report.rows


def signal_to_noise() -> dict[str, tuple]:
    """Return {schedule: (time steps, ᾱ / (1 − ᾱ))}."""
    found = {}
    for name, keys in SCHEDULES.items():
        schedule = Schedule(keys | {"prediction_type": "v_prediction"})
        t = np.arange(0, len(schedule), 10)
        found[name] = t.tolist(), schedule.snr(t).tolist()
    return found
