"""report.html: one page, without any other file, that explains a trained run."""

import html
from collections.abc import Callable
from pathlib import Path

from tinyldm.data.dataset import DataError, Dataset
from tinyldm.evaluation.reverse import start_noise, trajectory
from tinyldm.explain.diagram import diagram
from tinyldm.explain.inside import inside
from tinyldm.explain.latents import copies, latents, schedule
from tinyldm.explain.live import NoLivePage, live_page
from tinyldm.explain.page import fill, json_for_html
from tinyldm.explain.reverse import attention, steer, watch
from tinyldm.explain.subject import Contents, Subject
from tinyldm.explain.training import training
from tinyldm.files import replacing
from tinyldm.progress import Bar
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.snapshots import prompts_for

REPORT, LIVE = "report.html", "live.html"  # files in the folder of the run
MOST_PROMPTS = 4


def explain(
    run: Path,
    pipeline: Pipeline,
    training_data: Dataset,
    held_out: Dataset,
    say: Callable[[str], None],
) -> list[Path]:
    """Write the pages that explain a run into its folder: report.html and live.html; → them.

    training_data, held_out: images that it was trained on, and others. say: takes a line where a
    model cannot run in a page. Raises DataError for a model that needs an init image.
    """
    if pipeline.task != "generation":
        raise DataError(
            f"{run}: expected a run that generates from captions, classes or noise alone, found "
            f"one for {pipeline.task}"
        )
    prompts = list(dict.fromkeys(prompts_for(training_data)))
    if len(prompts) > MOST_PROMPTS:
        prompts = prompts[: MOST_PROMPTS - 1] + prompts[-1:]
    subject, contents = Subject(run, pipeline, training_data, held_out, prompts), Contents()
    if subject.is_conditional:
        subject.prompts = list(dict.fromkeys([*prompts, ""]))
    start = start_noise(pipeline, 1).repeat(len(subject.prompts), axis=0)  # one for all captions
    path = trajectory(pipeline, subject.prompts, start=start)
    chapters = {
        "watch": lambda: watch(subject, path, contents),
        "steer": lambda: subject.is_conditional and steer(subject, contents),
        "attention": lambda: attention(subject, path, contents),
        "schedule": lambda: schedule(subject, contents),
        "latents": lambda: latents(subject, contents),
        "training": lambda: training(subject, contents),
        "inside": lambda: _inside(subject, contents),
        "copies": lambda: copies(subject, contents),
        "live": lambda: _live(subject, say),
    }
    left_out = []
    with Bar(chapters.items(), unit="chapter", disable=None) as bar:
        for name, chapter in bar:
            bar.set_description(name)
            if chapter() is False:
                left_out.append(name)
    contents.texts["leftOut"] = left_out
    has = {
        "captions": subject.is_conditional,
        "shapes": training_data.readable,
        "autoencoder": bool(pipeline.vae.shapes()),
        "drawn": pipeline.vae.draws_noise,
        "held-out": bool(len(held_out)),
        "floor": pipeline.vae.draws_noise and bool(len(held_out)),
    }
    contents.texts["has"] = [name for name, there in has.items() if there]
    page = fill(
        "report.html", script="report.js", name=html.escape(run.name),
        data=json_for_html(vars(contents)),
    )  # fmt: skip
    with replacing(run / REPORT) as temporary:
        Path(temporary).write_text(page, encoding="utf-8")
    return [run / REPORT, *([run / LIVE] if "live" not in left_out else [])]


def _inside(subject, contents):
    """List the blocks, and draw them."""
    blocks = inside(subject, contents)
    contents.plots["diagram"] = diagram(blocks, subject.prompts[0])


def _live(subject, say):
    """Write live.html; → whether there is one."""
    captions = [caption for caption in [*subject.prompts, *subject.training.captions] if caption]
    try:
        page = live_page(subject.run.name, subject.pipeline, captions)
    except NoLivePage as reason:
        say(f"{LIVE} is left out: {reason}")
        (subject.run / LIVE).unlink(missing_ok=True)  # of an older model
        return False
    with replacing(subject.run / LIVE) as temporary:
        Path(temporary).write_text(page, encoding="utf-8")
    return True
