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
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from tinyldm.data.shapes import make_shapes
from tinyldm.diffusion.schedule import PREDICTIONS, Schedule
from tinyldm.evaluation.metrics import SEED
from tinyldm.evaluation.plots import Curves, save_plot
from tinyldm.evaluation.scenes import generate
from tinyldm.experiments.scoring import Report, accuracy
from tinyldm.experiments.trained import new_run, with_steps
from tinyldm.training.config import SCHEDULES
from tinyldm.training.loop import Job, fit
from tinyldm.training.networks import Models
from tinyldm.training.preparation import Say, fit_tokenizer, load_data, split
from tinyldm.training.presets import PRESETS
from tinyldm.training.signals import Interruptible
from tinyldm.training.stages import begin, second_stage

BASE = PRESETS["lesson"]
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


def run(seconds: float, out: Path, say: Say, count: int = CAPTIONS) -> list[dict]:
    """Run all trials; writes results.json, table.md, signal-to-noise.png, samples.png; → rows."""
    data = load_data(BASE)
    images = split(data, BASE)
    tokenizer, base = fit_tokenizer(BASE, data.captions, say)
    base = with_steps(base, seconds, len(images[0]))
    fingerprint, models = data.fingerprint(), Models(base, tokenizer)
    prompts = {
        name: make_shapes(count, base.side, SEED, held_out=name == "held_out")[1]
        for name in ("seen", "held_out")
    }
    sheet = []
    with Interruptible() as stop:
        report = Report(out, COLUMNS, stop)
        first = begin(models, images[0], fingerprint, "cpu", say)
        first = new_run(out / "first-stage", first, models, images, say)
        first.fit_autoencoder(stop)
        first_stage, batch_at = dict(first.state.average), None
        for names in TRIALS:
            trial = dict(zip(("schedule", "prediction", "weighting"), names, strict=True))
            models = Models(replace(base, **trial), tokenizer)
            say(", ".join(names))
            state = second_stage(models, first_stage, images[0], fingerprint, "cpu", say)
            one = new_run(out / "-".join(names), state, models, images, say)
            job = one.job()
            batch_at = batch_at or job.batch_at  # the images are encoded once for all
            started = time.monotonic()
            fit(one.folder, state, partial(Job, job.loss_fn, batch_at, say), stop)
            row = trial | {"steps": state.step, "seconds": time.monotonic() - started}
            pipeline = one.export()
            for name, captions in prompts.items():
                generated = generate(pipeline, captions, seed=SEED)
                row[f"accuracy_{name}"] = accuracy(generated, captions)
                if name == "seen":
                    sheet.append(generated[:SHOWN])
            report.add(row)
            say(f"{row['accuracy_seen']:.1%} of the captions are right")
    names = ["\n".join(trial) for trial in TRIALS]
    report.save_samples(sheet, names, prompts["seen"])
    save_plot(out / "signal-to-noise.png", noise_schedules())
    return report.rows


def noise_schedules() -> Curves:
    """Return ᾱ / (1 − ᾱ), signal to noise, of each schedule, against the time step."""
    found = {}
    for name, keys in SCHEDULES.items():
        schedule = Schedule(keys | {"prediction_type": "v_prediction"})
        t = np.arange(0, len(schedule), 10)
        found[name] = t.tolist(), schedule.snr(t).tolist()
    return Curves(found, "noise schedules", "time step t", "signal to noise, ᾱ / (1 − ᾱ)")
