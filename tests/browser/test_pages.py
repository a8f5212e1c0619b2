"""The pages of `tinyldm explain` in a real browser: Debian's Chromium, without a window.

Not part of the quick suite: `pip install -e ".[browser]"`, a Chromium, and `pytest tests/browser`.
"""

import base64
import json
import os
import shutil
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from model_cases import random_params
from PIL import Image
from playwright.sync_api import sync_playwright
from sheets import tiles_of
from small_model import CONFIG as MODEL
from small_model import PROMPTS
from small_run import CONFIG, silent, without_estimate

from tinyldm.checkpoints.components import make
from tinyldm.cli.evaluate import data_of
from tinyldm.explain import report, reverse
from tinyldm.explain.live import live_page, live_params
from tinyldm.models import ClassNames, Tokenizer
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.run import train

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
KINDS = {"captions": {}, "class-time": {"condition": "class-time"}, "none": {"condition": "none"}}


@pytest.fixture(scope="session")
def browser():
    assert CHROMIUM, "no Chromium: apt install chromium, or CHROMIUM=its path"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """`opened(file, width, scheme) → page`; what goes wrong in it fails the test at its end."""
    wrong, pages = [], []

    def open_page(file, width=1100, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        own = f"file://{file}"
        page.on("request", lambda r: r.url.startswith((own, "data:")) or wrong.append(r.url))
        page.goto(own)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A function that trains and explains a run once: its kind → its folder."""
    folder = tmp_path_factory.mktemp("pages")

    def run(kind):
        if not (folder / kind).exists():
            with pytest.MonkeyPatch.context() as patch:
                without_estimate(patch)
                patch.setitem(reverse.FEW_STEPS, "steps", 1)
                train(folder / kind, replace(CONFIG, **KINDS[kind]), say=silent)
                _, training, held_out = data_of(folder / kind, None)
                pipeline = Pipeline.load(folder / kind)
                report.explain(folder / kind, pipeline, training, held_out, silent)
        return folder / kind

    return run


# ------------------------------------------------------------------------------------- report.html

CONTROLS = "select, input, button, summary, a[href], pre[tabindex]"
SHOWN = "(e) => e.offsetParent !== null"
STATE = """() => [...document.querySelectorAll(".tile, [data-text], #training-sheet")].map(
    (e) => e.style.backgroundPosition + e.textContent + (e.src || "").length).join("|")"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["report.html", "live.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone_and_ask_for_nothing(kind, file, scheme, made, opened):
    for width in (360, 1100):
        page = opened(made(kind) / file, width, scheme)
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        widths = page.evaluate(
            f"""() => [...document.querySelectorAll(".tile")].filter({SHOWN}).map(
                (e) => e.getBoundingClientRect().width)"""
        )
        assert min(widths) >= 60
    assert (made(kind) / file).stat().st_size < 4e6


@pytest.mark.parametrize("file", ["report.html", "live.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(file, scheme, made, opened):
    """4.5 to 1 at least (WCAG 2.1, criterion 1.4.3)."""
    page = opened(made("captions") / file, scheme=scheme)
    colours = page.evaluate(
        """() => ["body", "figcaption", "a", "button", ".warning", "nav a"].flatMap((selector) => {
            const e = document.querySelector(selector);
            return e ? [getComputedStyle(e).color] : [];
        }).concat(getComputedStyle(document.body).backgroundColor)"""
    )

    def luminance(colour):
        channels = [float(c) / 255 for c in colour[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    *inks, paper = map(luminance, colours)
    assert len(inks) >= 2
    for ink in inks:
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5


@pytest.mark.parametrize("file", ["report.html", "live.html"])
@pytest.mark.parametrize("kind", KINDS)
def test_tab_reaches_every_control_and_each_has_a_name(file, kind, made, opened):
    page = opened(made(kind) / file)
    wanted = page.evaluate(
        f"""() => {{
            const all = [...document.querySelectorAll("{CONTROLS}")].filter({SHOWN});
            all.forEach((e, i) => (e.dataset.number = i));
            return all.length;
        }}"""
    )
    reached = set()
    for _ in range(wanted + 2):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.number"))
    assert {str(i) for i in range(wanted)} <= reached
    nameless = page.evaluate(
        f"""() => [...document.querySelectorAll("select, input")].filter({SHOWN}).filter(
            (e) => !e.labels.length && !e.getAttribute("aria-label")).map((e) => e.id)"""
    )
    assert nameless == []


def movable(page):
    """The ids of the controls that have more than one value."""
    return page.evaluate(
        f"""() => [...document.querySelectorAll("select, input[type=range]")]
            .filter({SHOWN})
            .filter((e) => (e.options ? e.options.length > 1 : e.max > 0))
            .map((e) => e.id)"""
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_moves_by_keyboard(kind, made, opened):
    page = opened(made(kind) / "report.html")
    names = movable(page)
    assert len(names) >= 4
    for name in names:
        control = page.locator(f"#{name}")
        control.focus()
        before, spoken = page.evaluate(STATE), control.get_attribute("aria-valuetext")
        at_end = control.evaluate("(e) => [e.length - 1, Number(e.max)].includes(place(e.id))")
        page.keyboard.press("ArrowUp" if at_end and spoken is None else "ArrowDown")
        if spoken is not None:  # a slider
            page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
            page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
            assert control.get_attribute("aria-valuetext") != spoken, name
        assert page.evaluate(STATE) != before, name


def test_play_goes_to_the_end_and_stops(made, opened):
    page = opened(made("captions") / "report.html")
    page.get_by_role("button", name="Play").focus()
    page.keyboard.press("Enter")
    slider = "document.getElementById('watch-step')"
    page.wait_for_function(f"{slider}.value === {slider}.max")
    page.wait_for_function("document.querySelector('[data-plays]').textContent === 'Play'")


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_show_the_image_that_the_controls_ask_for(kind, made, opened):
    """A tile on the screen is the image of its sheet that the controls ask for, and no other."""
    page = opened(made(kind) / "report.html")
    data = json.loads(page.locator("#data").inner_text())
    page.add_style_tag(content=".tile { border: 0 !important; width: 160px !important; }")
    rng = np.random.default_rng(0)
    for _ in range(3):
        for name in movable(page):
            control = page.locator(f"#{name}")
            most = control.evaluate("(e) => (e.options ? e.length - 1 : Number(e.max))")
            value = int(rng.integers(most + 1))
            if control.evaluate("(e) => e.tagName") == "SELECT":
                control.select_option(index=value)
            else:
                control.fill(str(value))
        tiles = [tile for tile in page.locator(".tile[data-sheet]").all() if tile.is_visible()]
        for i in rng.permutation(len(tiles))[:12]:
            tile, at = tiles[i], []
            for axis in ("row", "column"):
                names = tile.get_attribute(f"data-{axis}") or ""
                at.append(page.evaluate("(names) => place(names)", names))
            of_sheet = tiles_of(data["sheets"][tile.get_attribute("data-sheet")]).astype(float)
            seen = Image.open(BytesIO(tile.screenshot())).convert("RGB")
            seen = np.asarray(seen.resize(of_sheet.shape[3:1:-1], Image.Resampling.BOX), float)
            distance = np.abs(of_sheet - seen).mean(axis=(2, 3, 4))
            assert distance[tuple(at)] <= distance.min() + 1, tile.get_attribute("aria-label")
            assert len(tile.get_attribute("aria-label")) > 5


def test_the_way_from_a_word_to_its_map(made, opened):
    page = opened(made("captions") / "report.html")
    data = json.loads(page.locator("#data").inner_text())
    for i, words in enumerate(data["texts"]["attention-words"]):
        page.locator("#attention-prompt").select_option(index=i)
        guess, *captions = page.locator("#attention-maps figcaption").all_inner_texts()
        assert [c.partition("\n")[0] for c in captions] == [word or "(padding)" for word in words]
        assert guess.startswith("the guess") and all(c.endswith("%") for c in captions)


def test_a_block_opens_to_its_source(made, opened):
    page = opened(made("captions") / "report.html")
    block = page.locator("#blocks details", has_text="conv_in").first
    block.locator("summary").focus()
    page.keyboard.press("Enter")
    assert "def conv2d" in block.locator("pre").inner_text()


# ------------------------------------------------------------------------------------- live.html

NETWORKS = {  # what there is to compute → changes of the configs
    "a caption": {},
    "epsilon": {"scheduler": {"prediction_type": "epsilon"}},
    "sample": {"scheduler": {"prediction_type": "sample", "set_alpha_to_one": True}},
    "attention in the first stage": {"vae": {"mid_block_add_attention": True}},
    "no convolutions beside it": {"vae": {"use_post_quant_conv": False, "use_quant_conv": False}},
    "linear projections, twice as deep": {
        "unet": {"use_linear_projection": True, "transformer_layers_per_block": 2}
    },
    "other waves": {"unet": {"flip_sin_to_cos": False, "freq_shift": 1}},
    "no summary of the text": {"unet": {"addition_embed_type": None}},
    "no middle": {"unet": {"mid_block_type": None}},
    "two layers a level": {"unet": {"layers_per_block": [2, 1], "attention_head_dim": [1, 2]}},
    "another activation": {"text_encoder": {"hidden_act": "gelu", "num_hidden_layers": 2}},
    "pixels": {"first_stage": "none"},
    "classes with the time": {"condition": "class-time"},
    "classes as tokens": {"condition": "class-token"},
}


def pipeline_of(changes):
    """A model of random weights with the configs of a small run, changed."""
    ours = {key: value for key, value in changes.items() if isinstance(value, str)}
    config = replace(MODEL, **ours)
    tokenizer = Tokenizer.train(PROMPTS * 2, vocab_size=600, max_length=config.tokens)
    if config.has_classes:
        tokenizer = ClassNames([prompt for prompt in PROMPTS if prompt])
    configs = config.configs(tokenizer)
    for name, change in changes.items():
        if not isinstance(change, str):
            configs[name] = configs[name] | change
    configs["vae"] |= {"scaling_factor": 0.8}
    params = {}
    for name in configs.keys() - {"scheduler"}:
        shapes = make(name, configs[name]).shapes()
        random = random_params(shapes, name) if shapes else {}
        params[name] = {key: w.astype(np.float32) for key, w in random.items()}
    pipeline = Pipeline(configs, params, tokenizer, {"steps": 4, "guidance": 2.0})
    for name, weights in live_params(pipeline).items():  # as the page has them
        component, _, key = name.partition(".")
        pipeline.params[component][key] = weights.astype(np.float32)
    return pipeline


@pytest.mark.parametrize("what", NETWORKS)
@pytest.mark.parametrize("guidance", [1, 2.5])
def test_the_page_generates_what_numpy_does(what, guidance, opened, tmp_path):
    """To 1e-3 of the range of the pixels, on the same rounded weights."""
    pipeline = pipeline_of(NETWORKS[what])
    (tmp_path / "live.html").write_text(live_page("a", pipeline, PROMPTS[:2]), encoding="utf-8")
    page = opened(tmp_path / "live.html")
    h, w = (side // pipeline.vae.factor for side in pipeline.size)
    noise = np.random.default_rng(1).standard_normal((1, h, w, pipeline.vae.latent_channels))
    latents, pixels = page.evaluate(
        """async ([prompt, noise, guidance]) => {
            const start = { ...model.size, data: Float32Array.from(noise) };
            const x = await ddim(prompt, start, 5, guidance, async () => {});
            return [Array.from(x.data), Array.from(decode(x).data)];
        }""",
        [PROMPTS[1], noise.ravel().tolist(), guidance],
    )
    params = pipeline.sampling_params(PROMPTS[1], steps=5, guidance=guidance, sampler="ddim")
    *_, (x, _) = pipeline.denoise(params, noise.astype(np.float32))
    expected = pipeline.vae.from_latents(pipeline.params["vae"], x)[0]
    assert np.abs(expected).max() > 0.1 and expected.std() > 0.02
    scale = max(1, np.abs(x).max())
    np.testing.assert_allclose(latents, x.ravel(), atol=1e-3 * scale)
    np.testing.assert_allclose(pixels, expected.ravel(), atol=1e-3 * max(1, np.abs(expected).max()))


def test_captions_become_the_same_tokens(opened, tmp_path):
    pipeline = pipeline_of({})
    (tmp_path / "live.html").write_text(live_page("a", pipeline, PROMPTS), encoding="utf-8")
    page = opened(tmp_path / "live.html")
    texts = [
        *PROMPTS, "  A   RED\tcircle!! ", "it's 42nd's we're", "größer ΑΣ Σ", "e\u0301cole naïve",
        "円を描く 🙂 x", "a" * 40, "12 345", "_under-score_ …", "ǅ ﬁ ⅷ", "red " * 20,
    ]  # fmt: skip
    found = page.evaluate("(texts) => texts.map(tokenize)", texts)
    with pytest.warns(UserWarning, match="caption cut"):
        assert found == pipeline.tokenizer(texts).tolist()


def generated(page):
    """Wait for the image, and return it."""
    page.wait_for_function("document.getElementById('status').textContent.startsWith('Done')")
    image = page.evaluate("document.getElementById('guess').toDataURL()")
    return np.asarray(Image.open(BytesIO(base64.b64decode(image.partition(",")[2]))))


def test_generating_by_keyboard(made, opened):
    page = opened(made("captions") / "live.html")

    def ask(prompt, seed, guidance="2"):
        page.evaluate("document.getElementById('status').textContent = ''")
        page.fill("#guidance", guidance)
        page.select_option("#steps", "5")
        page.fill("#seed", str(seed))
        page.fill("#prompt", prompt)
        page.press("#prompt", "Enter")
        return generated(page)

    first = ask("a large red circle on blue at the left", 0)
    assert page.locator("#strip li").count() == 5
    assert page.inner_text("#unknown") == "" and page.inner_text("#guidance-value") == "2"
    assert "red circle" in page.get_attribute("#guess", "aria-label")
    np.testing.assert_array_equal(ask("a large red circle on blue at the left", 0), first)
    assert (ask("a large red circle on blue at the left", 1) != first).any()
    ask("a large red elephant on blue at the zebra", 0)
    assert page.inner_text("#unknown").startswith("No caption of training had: elephant, zebra.")
    page.fill("#prompt", "a large red circle on blue at the left " * 3)
    page.press("#prompt", "Tab")
    assert "is cut after" in page.inner_text("#unknown")


def test_it_can_be_stopped(made, opened):
    page = opened(made("captions") / "live.html")
    page.select_option("#steps", "50")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#stop:visible")
    page.keyboard.press("Escape")
    page.wait_for_function("document.getElementById('status').textContent === 'Stopped.'")
    page.wait_for_timeout(300)
    assert page.locator("#strip li").count() < 50
    assert page.inner_text("#status") == "Stopped." and page.locator("#stop").is_hidden()


def test_noise_of_the_page_is_standard_normal(made, opened):
    page = opened(made("captions") / "live.html")
    z = np.array(
        page.evaluate("Array.from({ length: 60 }, (_, i) => Array.from(noiseOf(i).data)).flat()")
    )
    n = len(z)
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4 / n**0.5


def test_what_is_no_class_is_refused(made, opened):
    page = opened(made("class-time") / "live.html")
    page.fill("#prompt", "hexagon")
    page.press("#prompt", "Enter")
    page.wait_for_function("document.getElementById('status').textContent.includes('wrong')")
    assert "expected" in page.inner_text("#status") and page.locator("#stop").is_hidden()


def test_a_model_of_classes_offers_them(made, opened):
    page = opened(made("class-time") / "live.html")
    offered = page.evaluate("model.captions")
    assert set(offered) == set(page.evaluate("Object.keys(model.tokenizer.classes)")) - {""}
    page.fill("#prompt", offered[0])
    page.select_option("#steps", "5")
    page.press("#prompt", "Enter")
    generated(page)


@pytest.mark.parametrize(
    "kind, asks, never",
    [
        ("captions", "Caption", ["class", "noise alone"]),
        ("class-time", "Class", ["caption", "Caption", "noise alone"]),
        ("none", None, ["caption", "Caption", "class", "Guidance"]),
    ],
)
def test_the_live_page_speaks_of_what_its_model_is_asked_for(kind, asks, never, made, opened):
    page = opened(made(kind) / "live.html")
    text = page.inner_text("main")
    assert not [word for word in never if word in text]
    assert (
        page.locator("#prompt").is_visible() == page.locator("#guidance").is_visible() == bool(asks)
    )
    if asks:
        assert page.inner_text("label[for=prompt]") == asks
    page.select_option("#steps", "5")
    if asks:
        page.fill("#prompt", "")
    page.press("#start", "Enter")
    generated(page)
    nothing = f"no {asks.lower()}" if asks else "noise alone"
    assert f"“{nothing}”" in page.inner_text("#status")
