"""Chapters on the reverse process: watch it, steer it, and see to which words it attends."""

import numpy as np
from scipy.special import softmax

from tinyldm.backend import Array, to_device
from tinyldm.checkpoints.components import make
from tinyldm.data.shapes import COLOURS, POSITIONS, SHAPES
from tinyldm.evaluation.figures import latents_as_images
from tinyldm.evaluation.reverse import Trajectory, guesses, start_noise
from tinyldm.explain.subject import Contents, Subject
from tinyldm.kernels import plain
from tinyldm.models import Tokenizer
from tinyldm.models.blocks import Attention
from tinyldm.models.unet import UNet
from tinyldm.nn import no_grad
from tinyldm.nn.attention import split_heads
from tinyldm.nn.layers import Layer
from tinyldm.nn.protocol import Backward, Params
from tinyldm.sampling.pipeline import Pipeline

GROUND = "yellow"  # of the images in which one chooses shape, colour and place
SMALLEST = 8  # pixels of a side of a map
SHADES = 24  # more would make a larger file
MOST_STEERED = 24  # captions to choose from, where they are not of shapes
FEW_STEPS = {"sampler": "dpm++2m", "steps": 10}  # nearly as good as 25 of ddim
HEAT = ((13, 8, 60), (90, 20, 110), (190, 55, 85), (245, 135, 40), (252, 250, 190))  # from 0 to 1


def watch(subject: Subject, path: Trajectory, contents: Contents) -> None:
    """Show each step: x_t, and the x_0 guessed with the caption, without it, and with guidance."""
    pipeline, prompts = subject.pipeline, subject.prompts
    rows = {
        "noisy": np.stack([pipeline.decode(x) for x in path.states]),
        "latents": np.stack([latents_as_images(to_device(x, "cpu")) for x in path.states]),
        "guided": np.stack([pipeline.decode(x0) for x0 in path.guesses]),
        "with": guesses(pipeline, path, prompts),
    }
    if subject.is_conditional:
        rows["without"] = guesses(pipeline, path, [""] * len(prompts))
    for name, images in rows.items():
        contents.sheet(f"watch-{name}", images.swapaxes(0, 1))  # a row for each caption
    contents.text("prompts", [prompt or "(no caption)" for prompt in prompts])
    n = len(path.t)
    contents.text("watch-t", [f"step {i + 1} of {n}, t = {t}" for i, t in enumerate(path.t)])
    shares = [
        f"{_percent(share)} of the variance of x is image, the rest noise"
        for share in path.alphas_bar
    ]
    contents.text("watch-signal", shares)


def steer(subject: Subject, contents: Contents) -> None:
    """Show many captions, each at several guidance scales, all from the same noise."""
    pipeline = subject.pipeline
    default = pipeline.defaults["guidance"]
    guidances = sorted({0.0, 1.0, default, 8.0})
    if subject.training.readable and isinstance(pipeline.tokenizer, Tokenizer):
        words = {"colour": [c for c in COLOURS if c != GROUND], "shape": SHAPES, "place": POSITIONS}
        prompts = [
            f"a large {colour} {shape} on {GROUND} at the {place}"
            for colour in words["colour"] for shape in SHAPES for place in POSITIONS
        ]  # fmt: skip
    else:
        prompts = list(dict.fromkeys(subject.training.captions))[:MOST_STEERED]
        words = {"caption": prompts}
    columns = []
    for guidance in guidances:
        some = prompts if guidance else prompts[:1]  # at 0 the caption says nothing
        latents = start_noise(pipeline, 1).repeat(len(some), axis=0)
        images = pipeline(some, latents=latents, guidance=guidance, **FEW_STEPS)
        images *= len(prompts) // len(some)
        columns.append(np.stack([np.asarray(image) for image in images]))
    contents.sheet("steer", np.stack(columns, axis=1))
    contents.text("steer-captions", prompts)
    for name in ("colour", "shape", "place", "caption"):
        contents.text(f"steer-{name}", words.get(name, [""]))
    names = [f"{g:g}" + ", the default" * (g == default) for g in guidances]
    contents.text("steer-guidance", names)
    contents.text("steer-default", [str(guidances.index(default))])


class Watched(Layer):
    """A cross-attention layer that keeps its probabilities, averaged over heads: (n, l, m)."""

    def __init__(self, layer: Attention, kept: dict[str, np.ndarray], name: str):
        self.layer, self.kept, self.name = layer, kept, name

    def __call__(self, params: Params, x: Array, context: Array) -> tuple[Array, Backward]:
        """Attend as the layer does."""
        q, _ = self.layer.to_q(params, x)
        k, _ = self.layer.to_k(params, context)
        q, k = (split_heads(to_device(z, "cpu"), self.layer.heads) for z in (q, k))
        p = softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3]), axis=3)
        self.kept[self.name] = p.mean(axis=1)
        return self.layer(params, x, context)


def watched_unet(pipeline: Pipeline) -> tuple[UNet, dict[str, np.ndarray]]:
    """Build the U-Net anew, so that its cross-attention is watched: it, and what a call fills."""
    unet, kept = make("unet", pipeline.configs["unet"]), {}
    parts = {"on the way down": [block.layers for block in unet.down_blocks]}
    parts |= {"in the middle": [unet.mid_layers]}
    parts |= {"on the way up": [block.layers for block in unet.up_blocks]}
    for part, blocks in parts.items():
        for i, layers in enumerate(blocks):
            for j, layer in enumerate(layers):
                for block in layer.attention.blocks if layer.attention else []:
                    block.attn2 = Watched(block.attn2, kept, f"{part}, block {i}.{j}")
    return unet, kept


def attention(subject: Subject, path: Trajectory, contents: Contents) -> bool:
    """Show how much each position attends to each token, at each step; → whether it attends."""
    pipeline = subject.pipeline
    if not (isinstance(pipeline.tokenizer, Tokenizer) and subject.is_conditional):
        return False
    tokenizer = pipeline.tokenizer
    unet, kept = watched_unet(pipeline)
    h, w = path.states[0].shape[1:3]
    context, maps = pipeline.embed(subject.prompts), {}
    with plain(), no_grad():
        for x, t in zip(path.states, path.t, strict=True):
            steps = pipeline.xp.full(len(x), t)
            unet(pipeline.params["unet"], x, steps, context=context)
            for name, p in kept.items():
                maps.setdefault(name, []).append(p)
    if not maps:
        return False
    ids = tokenizer(subject.prompts)
    lengths = (ids == tokenizer.end_id).argmax(axis=1) + 1  # with start and end
    m = int(lengths.max())
    names, sheets, most, told = [], [], [], []
    for name, of_steps in maps.items():
        p = np.stack(of_steps)[..., :m].transpose(1, 3, 0, 2)  # (n, tokens, steps, positions)
        factor = round((h * w / p.shape[3]) ** 0.5)
        rows, columns = -(-h // factor), -(-w // factor)
        names.append(f"layer {len(names) + 1} of {len(maps)}, {name}, {rows}×{columns}")
        most.append(p.max(axis=3))
        said = [
            f"most at row {i + 1}, column {j + 1} of {rows}×{columns}"
            for i in range(rows) for j in range(columns)
        ]  # fmt: skip
        told.append(np.array(said)[p.argmax(axis=3)])
        both = np.stack([p, p / p.max(axis=3, keepdims=True)], axis=1)  # two scales
        sheets.append(heat(both.reshape(*both.shape[:-1], rows, columns)))
    finest = max((sheet.shape[4:6] for sheet in sheets), key=max)
    size = [side * -(-SMALLEST // min(finest)) for side in finest]
    every = np.stack([_enlarged(sheet, *size) for sheet in sheets], axis=1)
    told = np.stack([told, told], axis=2).swapaxes(0, 1)  # (n, layers, scales, tokens, steps)
    contents.sheet("attention", every.reshape(-1, *every.shape[4:]), told.ravel().tolist())
    contents.text("attention-layers", names)
    contents.text(
        "attention-scales", ["of the whole, 0 to 100 %", "of each token's own largest share"]
    )
    shares = np.stack(most, axis=1).ravel()  # in the order of the tiles, without the scales
    contents.text("attention-most", [f"{100 * share:.0f}\u00a0%" for share in shares])
    words = []
    for row, length in zip(ids, lengths, strict=True):
        inner = [tokenizer.decode([token]) for token in row[1 : length - 1]]
        words.append((["(start)", *inner, "(end)"] + [""] * m)[:m])
    contents.text("attention-words", words)
    return True


def _enlarged(maps, h, w):
    """Repeat the positions of maps (…, rows, columns, 3) → (…, h, w, 3)."""
    rows, columns = maps.shape[-3:-1]
    return maps[..., (np.arange(h) * rows // h)[:, None], np.arange(w) * columns // w, :]


def _percent(share):
    """Write a share as per cent, with two digits where it is small."""
    return f"{100 * share:.1f} %" if share > 0.001 else f"{100 * share:.2g} %"


def heat(p: np.ndarray) -> np.ndarray:
    """Colour numbers (…), from dark at 0 to light at 1 → uint8 (…, 3), in few shades."""
    anchors = np.array(HEAT, float)
    places = np.round(p * SHADES) / SHADES * (len(anchors) - 1)
    channels = [np.interp(places, np.arange(len(anchors)), anchors[:, k]) for k in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
