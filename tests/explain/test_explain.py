"""`tinyldm explain`: what its pages show is what the model does."""

import base64
import json
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
from sheets import tiles_of
from small_run import CONFIG, silent, without_estimate

from tinyldm.cli.evaluate import data_of
from tinyldm.data.dataset import DataError
from tinyldm.diffusion.guidance import guided
from tinyldm.evaluation.plots import PlotsLeftOut
from tinyldm.evaluation.reverse import start_noise, trajectory
from tinyldm.explain import report, reverse
from tinyldm.explain.diagram import cells_of, diagram
from tinyldm.explain.inside import blocks_of
from tinyldm.explain.latents import schedule
from tinyldm.explain.live import NoLivePage, live_page, live_params
from tinyldm.explain.reverse import Watched, watched_unet
from tinyldm.explain.subject import Contents, Subject
from tinyldm.kernels import plain
from tinyldm.nn import no_grad
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.run import train

RUNS = {
    "captions": {},
    "deep": {"unet_widths": (8, 12), "unet_attention": (False, True), "unet_layers": (0, 1)},
    "class-time": {"condition": "class-time"},
    "class-token": {"condition": "class-token"},
    "none": {"condition": "none"},
    "codebook": {"first_stage": "vq"},
    "pixels": {"first_stage": "none"},
    "grey": {"grey": True},
}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """One step where ten are taken: hundreds of images are generated."""
    monkeypatch.setitem(reverse.FEW_STEPS, "steps", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that trains a run of `RUNS` once: name → its folder."""
    folder = tmp_path_factory.mktemp("explained")

    def run(name):
        if not (folder / name).exists():
            with pytest.MonkeyPatch.context() as patch:
                without_estimate(patch)
                train(folder / name, replace(CONFIG, **RUNS[name]), say=silent)
        return folder / name

    return run


def subject_of(run, count=2):
    _, training, held_out = data_of(run, None)
    pipeline = Pipeline.load(run)
    prompts = list(dict.fromkeys(training.captions))[:count]
    return Subject(run, pipeline, training, held_out, prompts)


class Page(HTMLParser):
    """The elements of a page, and the texts of its scripts by id."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self.open:
            self.scripts[self.open] = self.scripts.get(self.open, "") + data


def contents_of(run):
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    return page, json.loads(page.scripts["data"])


QUICK = ("captions", "class-time", "none")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in RUNS if n not in QUICK)]
)
def test_every_kind_of_run_is_explained(name, made, call):
    run = made(name)
    result = call("explain", run)
    assert result.code == 0
    pages = [str(run / "report.html"), str(run / "live.html")]
    assert result.out.split() == (pages[:1] if name == "codebook" else pages)
    page, data = contents_of(run)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    for _, attrs in page.elements:  # every control and image has something to show
        for key in ("data-row", "data-column", "data-at"):
            names = attrs.get(key, "").split()
            assert {one for one in names if "/" not in one} <= set(ids)
        left_out = set(data["texts"]["leftOut"])
        if "data-sheet" in attrs and attrs["data-sheet"].split("-")[0] not in left_out:
            unconditional = attrs["data-sheet"] == "watch-without" and name == "none"
            assert attrs["data-sheet"] in data["sheets"] or unconditional
        for kind, key in (("texts", "data-text"), ("texts", "data-values"), ("plots", "data-plot")):
            if key in attrs and attrs[key].split("-")[0] not in left_out:
                missing = (name, attrs[key]) in {
                    ("pixels", "loss-autoencoder"), ("pixels", "loss-floor"),
                    ("codebook", "loss-floor"),
                }  # fmt: skip
                assert (attrs[key] in data[kind]) != missing
    left_out = {"none": {"steer", "attention"}, "class-time": {"attention"}}
    left_out |= {"class-token": {"attention"}, "codebook": {"live"}}
    assert set(data["texts"]["leftOut"]) == left_out.get(name, set())
    for sheet in data["sheets"].values():
        tiles_of(sheet)
    for plot in data["plots"].values():
        ET.fromstring(plot)


def test_pages_ask_for_nothing_else(made):
    run = made("captions")
    report.explain(run, *vars_of(subject_of(run)), silent)
    for file in ("report.html", "live.html"):
        page = Page((run / file).read_text(encoding="utf-8"))
        wanted = [
            attrs[key]
            for _, attrs in page.elements
            for key in ("src", "href")
            if attrs.get(key) and not attrs[key].startswith(("#", "data:"))
        ]
        assert set(wanted) <= {"live.html", "report.html"}
        assert "@import" not in (run / file).read_text(encoding="utf-8")


def vars_of(subject):
    return subject.pipeline, subject.training, subject.held_out


def test_a_caption_cannot_write_into_the_page(made):
    """It is text, whatever it holds, in the diagram, too."""
    subject = subject_of(made("captions"))
    evil = '</script><img src=x onerror="alert(1)">'
    drawn = ET.fromstring(diagram(blocks_of(subject), "<img src=x>"))
    assert "“<img src=x>”" in [element.text for element in drawn.iter()]
    page = Page(live_page(evil, subject.pipeline, [evil]))
    assert json.loads(page.scripts["model"])["captions"] == [evil]
    assert not [tag for tag, _ in page.elements if tag == "img"]


def test_a_run_with_an_init_image_is_refused(made, tmp_path, monkeypatch, call):
    without_estimate(monkeypatch)
    train(tmp_path / "run", replace(CONFIG, task="inpainting"), say=silent)
    result = call("explain", tmp_path / "run")
    assert result.code == 2 and result.err.count("\n") == 1 and "inpainting" in result.err
    assert not (tmp_path / "run" / "report.html").exists()
    subject = subject_of(tmp_path / "run")
    with pytest.raises(NoLivePage, match="inpainting"):
        live_page("a", subject.pipeline, ["a"])
    with pytest.raises(DataError, match="inpainting"):
        report.explain(subject.run, *vars_of(subject), silent)


def test_without_matplotlib_the_pages_are_there_without_curves(made, monkeypatch):
    run = made("captions")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(PlotsLeftOut):
        report.explain(run, *vars_of(subject_of(run)), silent)
    _, data = contents_of(run)
    assert {name for name, plot in data["plots"].items() if plot} == {"diagram"}


# ------------------------------------------------------------------------------ the reverse process


def test_a_trajectory_is_that_of_ddim(made):
    """Each state but the first is mixed from the state and the guess before it."""
    subject = subject_of(made("captions"))
    path = trajectory(subject.pipeline, subject.prompts)
    np.testing.assert_array_equal(path.states[0], start_noise(subject.pipeline, 2))
    alphas = np.array(path.alphas_bar)
    for i in range(len(path.t) - 1):
        a, s = np.sqrt(alphas[i]), np.sqrt(1 - alphas[i])
        epsilon = (path.states[i] - a * path.guesses[i]) / s
        following = np.sqrt(alphas[i + 1]) * path.guesses[i] + np.sqrt(1 - alphas[i + 1]) * epsilon
        np.testing.assert_allclose(path.states[i + 1], following, atol=1e-5)
    last = list(subject.pipeline.denoise(subject.pipeline.sampling_params(subject.prompts)))[-1]
    np.testing.assert_allclose(path.guesses[-1], last[1], atol=1e-5)


def test_the_guess_that_is_taken_is_the_guided_one(made):
    """without + g · (with − without), of what the page shows beside it."""
    subject = subject_of(made("captions"))
    pipeline, guidance = subject.pipeline, 2.0
    pipeline.defaults["guidance"] = guidance
    path = trajectory(subject.pipeline, subject.prompts)
    condition = pipeline.embed(["", "", *subject.prompts])
    predict = guided(lambda x, t: pipeline.predict(x, t, condition), guidance)
    for x, t, alpha_bar, x0 in zip(path.states, path.t, path.alphas_bar, path.guesses, strict=True):
        expected, _ = pipeline.schedule.split(predict(x, t), x, alpha_bar)
        np.testing.assert_allclose(x0, expected, atol=1e-5)


def test_steering_shows_what_its_captions_say(made):
    page = (files("tinyldm.explain.page") / "report.html").read_text(encoding="utf-8")
    assert page.count(f"</select> on {reverse.GROUND} at the") == 2
    subject, contents = subject_of(made("captions")), Contents()
    reverse.steer(subject, contents)
    sheet, texts = contents.sheets["steer"], contents.texts
    words = [texts[f"steer-{name}"] for name in ("colour", "shape", "place")]
    assert sheet["rows"] == len(texts["steer-captions"]) == np.prod([len(w) for w in words])
    assert sheet["columns"] == len(texts["steer-guidance"])
    row = 1 * len(words[1]) * len(words[2]) + 2 * len(words[2]) + 3  # as the page counts
    colour, shape, place = words[0][1], words[1][2], words[2][3]
    caption = f"a large {colour} {shape} on yellow at the {place}"
    assert texts["steer-captions"][row] == caption
    default = int(texts["steer-default"][0])
    assert texts["steer-guidance"][default].endswith("the default")
    latents = start_noise(subject.pipeline, 1)
    expected = subject.pipeline(caption, latents=latents, **reverse.FEW_STEPS)
    found = tiles_of(sheet)[row, default]
    assert abs(found - np.asarray(expected[0]).astype(int)).max() <= 1


def test_watching_changes_nothing_and_shares_add_up_to_one(made):
    subject = subject_of(made("deep"))
    pipeline = subject.pipeline
    x, t, context = (
        start_noise(subject.pipeline, 2),
        np.array([3, 700]),
        pipeline.embed(subject.prompts),
    )
    unet, kept = watched_unet(pipeline)
    with no_grad(), plain():
        y, _ = unet(pipeline.params["unet"], x, t, context=context)
        expected, _ = pipeline.unet(pipeline.params["unet"], x, t, context=context)
    np.testing.assert_array_equal(y, expected)
    up = [f"on the way up, block 0.{j}" for j in range(2)]
    assert list(kept) == ["on the way down, block 1.0", "in the middle, block 0.0", *up]
    for p in kept.values():
        assert p.shape == (2, 16, context.shape[1])
        np.testing.assert_allclose(p.sum(axis=2), 1, atol=1e-6)


def test_attention_of_one_head_is_softmax_by_hand():
    """Two positions, two tokens; the queries are x and the keys the context."""

    def identity(params, x):
        return x, None

    class OneHead:
        heads = 1

        def to_q(self, params, x):
            return x, None

        to_k = to_q

        def __call__(self, params, x, context):
            return x, None

    watched = Watched(OneHead(), {}, "a")
    x = np.array([[[1.0, 0.0], [0.0, 2.0]]])
    context = np.array([[[1.0, 1.0], [3.0, 0.0]]])
    watched({}, x, context)
    scores = np.array([[1.0, 3.0], [2.0, 0.0]]) / np.sqrt(2)
    expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(watched.kept["a"][0], expected, rtol=1e-12)


def test_words_of_the_attention_maps(made):
    subject, contents = subject_of(made("captions")), Contents()
    subject.prompts = [*subject.prompts, ""]
    path = trajectory(subject.pipeline, subject.prompts)
    assert reverse.attention(subject, path, contents)
    words, sheet = contents.texts["attention-words"], contents.sheets["attention"]
    for prompt, row in zip(subject.prompts, words, strict=True):
        inner = row[1 : row.index("(end)")]
        assert "".join(inner) == prompt.replace(" ", "") and row[0] == "(start)"
    layers, scales = (len(contents.texts[f"attention-{name}"]) for name in ("layers", "scales"))
    shape = len(words), layers, scales, len(words[0]), len(path.t)
    assert sheet["rows"] * sheet["columns"] == np.prod(shape) == len(sheet["said"])
    shares = np.reshape(
        [float(text.removesuffix("\u00a0%")) for text in contents.texts["attention-most"]],
        (*shape[:2], *shape[3:]),
    )
    lightness = tiles_of(sheet).astype(int).sum(axis=(4)).reshape(*shape, -1).max(axis=-1)
    assert (lightness[:, :, 1] == sum(reverse.HEAT[-1])).all()  # each has its own largest share
    said = reverse.heat(shares / 100).astype(int).sum(axis=-1)  # on one scale for all, to a shade
    assert abs(lightness[:, :, 0] - said).max() <= 50


def test_heat_goes_from_dark_to_light():
    colours = reverse.heat(np.linspace(0, 1, reverse.SHADES + 1)).astype(int)
    assert tuple(colours[0]) == reverse.HEAT[0] and tuple(colours[-1]) == reverse.HEAT[-1]
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()  # so that it is read without colours, too


# ------------------------------------------------------------------------------ the other chapters


def test_the_schedule_marks_as_much_noise_as_image(made):
    subject, contents = subject_of(made("captions")), Contents()
    schedule(subject, contents)
    found = re.search(r"as much noise as image: t = (\d+)", contents.plots["schedule"])
    snr = subject.pipeline.schedule.snr(np.array([int(found[1])]))[0]
    assert snr == pytest.approx(1, rel=0.01) and f"t = {found[1]}" in contents.texts["schedule-t"]
    first = tiles_of(contents.sheets["schedule-pixels"])[0, 0].astype(int)
    assert abs(first - subject.training.images[0]).mean() < 6  # at t = 0 there is hardly any noise
    assert contents.texts["schedule-t"][0] == "t = 0"


@pytest.mark.parametrize("name", ["captions", "deep", "class-time", "pixels"])
def test_blocks_hold_all_parameters_once_and_fit_together(name, made):
    subject = subject_of(made(name))
    blocks = blocks_of(subject)
    networks = subject.pipeline.params.values()
    assert sum(b.parameters for b in blocks) == sum(w.size for p in networks for w in p.values())
    assert all(0 < block.seconds < 60 for block in blocks)
    unet = [block for block in blocks if block.component == "unet"]
    h, w = (side // subject.pipeline.vae.factor for side in subject.pipeline.size)
    assert unet[-1].given == (h, w, subject.pipeline.vae.latent_channels)
    cells = cells_of(unet)
    assert len(cells["down"]) == len(cells["up"])
    for down, up in zip(cells["down"], reversed(cells["up"]), strict=True):
        skip, joined = down.blocks[-1].given, up.blocks[0].taken
        assert skip[:2] == joined[:2] and skip[2] < joined[2]


@pytest.mark.parametrize("name", ["captions", "deep", "class-time", "none", "pixels"])
def test_the_diagram_shows_every_shape(name, made):
    subject = subject_of(made(name), 1)
    blocks = blocks_of(subject)
    root = ET.fromstring(diagram(blocks, subject.prompts[0]))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    cells = cells_of([block for block in blocks if block.component == "unet"])
    for cell in cells["down"] + cells["up"]:
        assert cell.text in texts and cell.given in texts
    assert texts.count("image") == 2
    width, height = map(float, root.get("viewBox").split()[2:])
    for element in root.iter():
        for axis, size in (("x", width), ("y", height)):
            assert 0 <= float(element.get(axis, 1)) <= size


# ---------------------------------------------------------------------------------------- live.html


def test_the_live_page_is_short_enough_to_be_read():
    lines = []
    for name in ("network.js", "live.js"):
        text = (files("tinyldm.explain.page") / name).read_text(encoding="utf-8")
        lines += [line for line in text.splitlines() if line.strip() and line.strip()[:2] != "//"]
    assert len(lines) <= 400 and max(map(len, lines)) <= 110


def test_weights_of_the_live_page_are_those_of_the_model_in_16_bits(made):
    pipeline = subject_of(made("captions")).pipeline
    page = Page(live_page("a", pipeline, ["a red circle", "a red circle"]))
    model = json.loads(page.scripts["model"])
    numbers = np.frombuffer(base64.b64decode(page.scripts["weights"]), "<f2")
    start = 0
    for name, shape in model["shapes"]:
        component, _, key = name.partition(".")
        size = int(np.prod(shape))
        found = numbers[start : start + size].reshape(shape)
        expected = pipeline.params[component][key]
        np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-6)
        start += size
    assert start == numbers.size
    assert not any(name.startswith("vae.encoder") for name, _ in model["shapes"])
    assert model["captions"] == ["a red circle"] and model["words"] == ["a", "circle", "red"]


def test_a_model_that_is_too_large_has_no_live_page(made, monkeypatch, call):
    run = made("captions")
    monkeypatch.setattr("tinyldm.explain.live.MOST", 1000)
    (run / "live.html").write_text("of an older model")
    result = call("explain", run)
    assert result.code == 0 and "live.html is left out: expected at most 1,000" in result.err
    assert result.out.split() == [str(run / "report.html")]
    assert not (run / "live.html").exists()
    _, data = contents_of(run)
    assert data["texts"]["leftOut"] == ["live"]


def test_a_weight_that_16_bits_do_not_hold(made):
    pipeline = subject_of(made("captions")).pipeline
    pipeline.params["unet"]["conv_in.bias"] = np.full_like(
        pipeline.params["unet"]["conv_in.bias"], 1e5
    )
    with pytest.raises(NoLivePage, match=r"unet conv_in.bias: expected numbers below 65,504"):
        live_params(pipeline)


@pytest.mark.parametrize("sizes", [(12, 6, 3), (9, 5), (1,), (16,)])
def test_maps_of_all_layers_get_one_size(sizes):
    for side in sizes:
        maps = np.arange(side * side * 3).reshape(1, side, side, 3)
        large = reverse._enlarged(maps, max(sizes), max(sizes))
        assert large.shape == (1, max(sizes), max(sizes), 3)
        np.testing.assert_array_equal(np.unique(large), np.unique(maps))
        np.testing.assert_array_equal(large[:, 0, 0], maps[:, 0, 0])


def test_a_sheet_of_many_images_fits_into_a_file():
    contents, images = Contents(), np.zeros((9000, 3, 8, 8, 3), np.uint8)
    images[8999, 2] = 255
    contents.sheet("many", images, ["dark"] * 26_999 + ["light"])
    tiles = tiles_of(contents.sheets["many"])
    assert tiles.shape == images.shape and tiles[8999, 2].min() == 255 and tiles.sum() == 192 * 255
