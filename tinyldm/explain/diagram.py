"""The diagram of a model: its blocks as one U, with the real shape on every arrow, as SVG."""

import html
from collections.abc import Sequence

from tinyldm.explain.inside import Block, shown

LEFT, MIDDLE, RIGHT = 125, 400, 675  # centres of the columns, in units of the drawing
WIDTH, HEIGHT, PITCH = 232, 36, 78  # of a box, and from row to row
MIDDLE_WIDTH = 230
FIRST = 30  # height of the first row
STYLE = (
    "#diagram{color:#23262b;font:13.5px system-ui,sans-serif}"
    "@media(prefers-color-scheme:dark){#diagram{color:#e8e6e1}}"
    "#diagram rect,#diagram path{fill:none;stroke:currentColor}"
    "#diagram marker path{fill:currentColor}"
    "#diagram .skip{stroke-dasharray:5 4;opacity:.55}"
    "#diagram .again{stroke-dasharray:2 3}"
    "#diagram .condition{stroke:#2b83d6;stroke-width:1.6}"
    "#diagram text{fill:currentColor;text-anchor:middle}"
    "#diagram .shape{font-size:13px;opacity:.85}"
)
ARROW = (
    '<defs><marker id="arrow" markerUnits="userSpaceOnUse" markerWidth="10" '
    'markerHeight="10" refX="9" refY="5" orient="auto"><path d="M0 0L10 5L0 10z"/></marker></defs>'
)
WORDS = {  # part of a block's name → what the diagram calls it
    "resnets": "ResNet",
    "attentions": "attention",
    "downsamplers": "downsample",
    "upsamplers": "upsample",
    "conv_in": "convolution",
    "conv_norm_out": "norm",
    "conv_out": "convolution",
}


class Cell:
    """Blocks of the U-Net that make one box: they run one after the other at one place."""

    def __init__(self, block: Block):
        self.blocks = [block]

    @property
    def text(self) -> str:
        """Name the blocks."""
        names = (part for block in self.blocks for part in block.name.split("."))
        return " + ".join(WORDS[name] for name in names if name in WORDS)

    @property
    def given(self) -> str:
        """Return the shape that leaves the cell."""
        return shown(self.blocks[-1].given)

    @property
    def attends(self) -> bool:
        """Return whether one of the blocks is a spatial transformer."""
        return any("attentions" in block.name for block in self.blocks)


def cells_of(unet: Sequence[Block]) -> dict[str, list[Cell]]:
    """Gather the blocks of a U-Net, in the order of their calls, into {part: its cells}.

    Each cell of "down" leaves one skip, and each of "up" is given one.
    """
    parts, before = {"down": [], "mid": [], "up": []}, None
    for block in unet:
        where, *rest = block.name.split(".")
        if where in ("time_embedding", "add_embedding", "class_embedding"):
            continue
        part = {"conv_in": "down", "conv_norm_out": "up", "conv_out": "up"}.get(
            where, where.split("_")[0]
        )
        place = (where, rest[-1] if rest and rest[-1].isdigit() else "end")
        joins = part == "mid" or (part == "up" and place[1] == "end") or place == before
        if joins and parts[part]:
            parts[part][-1].blocks.append(block)
        else:
            parts[part].append(Cell(block))
        before = place
    return parts


class Drawing:
    """Gathers the boxes, arrows and texts of an SVG."""

    def __init__(self):
        self.parts = []

    def box(self, x: float, y: float, text: str, width: float = WIDTH) -> None:
        """Draw a box around a text, with its centre at (x, y)."""
        corner = f'x="{x - width / 2}" y="{y - HEIGHT / 2}"'
        self.parts.append(f'<rect {corner} width="{width}" height="{HEIGHT}" rx="6"/>')
        self.text(x, y + 5, text, "name")

    def text(self, x: float, y: float, text: str, kind: str = "shape") -> None:
        """Write a text centred at (x, y)."""
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}">{html.escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], kind: str = "data") -> None:
        """Draw an arrow along points."""
        path = "L".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M{path}" marker-end="url(#arrow)"/>')

    def svg(self, height: float, title: str) -> str:
        """Return the whole as an SVG element."""
        head = f'<svg id="diagram" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}"'
        label = f' role="img"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        return head + label + ARROW + "".join(self.parts) + "</svg>"


def diagram(blocks: Sequence[Block], caption: str) -> str:
    """Draw the networks: on the left an image becomes latents and features, on the right back.

    blocks: in the order of their calls, as `blocks_of` returns them. caption: an example.
    """
    of = {
        name: [b for b in blocks if b.component == name] for name in ("vae", "unet", "text_encoder")
    }
    cells, drawing = cells_of(of["unet"]), Drawing()
    conv_in = cells["down"][0].blocks[0]
    latents, first = shown(conv_in.taken), of["vae"]
    image = shown(first[0].taken) if first else latents
    coder = ("encoder", "decoder") if first else ("no first stage",) * 2

    def row(i):
        return FIRST + i * PITCH

    top, edge = 3, HEIGHT / 2  # the U-Net's first row
    bottom = row(top + len(cells["down"]))
    left = ["image", coder[0], "mix in noise of time step t", *(c.text for c in cells["down"])]
    down = [image, latents, latents, *(cell.given for cell in cells["down"])]
    right = ["image", coder[1], "sampler, step by step", *(c.text for c in reversed(cells["up"]))]
    up = [image, latents, *(cell.given for cell in reversed(cells["up"]))]
    for i, text in enumerate(left):
        drawing.box(LEFT, row(i), text)
        if i:
            drawing.arrow((LEFT, row(i - 1) + edge), (LEFT, row(i) - edge))
            drawing.text(LEFT + 48, row(i) - PITCH / 2 + 5, down[i - 1])
    for i, text in enumerate(right):
        drawing.box(RIGHT, row(i), text)
        if i:
            drawing.arrow((RIGHT, row(i) - edge), (RIGHT, row(i - 1) + edge))
            drawing.text(RIGHT + 48, row(i) - PITCH / 2 + 5, up[i - 1])
    for i, cell in enumerate(cells["down"]):
        y = row(top + i)
        drawing.arrow((LEFT + WIDTH / 2, y), (RIGHT - WIDTH / 2, y), kind="skip")
        drawing.text(LEFT + WIDTH / 2 + 50, y - 6, cell.given)
    middle = cells["mid"][0] if cells["mid"] else Cell(cells["down"][-1].blocks[-1])
    drawing.box(MIDDLE, bottom, middle.text if cells["mid"] else "no middle", MIDDLE_WIDTH)
    drawing.arrow(
        (LEFT, row(top + len(cells["down"]) - 1) + edge),
        (LEFT, bottom),
        (MIDDLE - MIDDLE_WIDTH / 2, bottom),
    )
    drawing.text(LEFT + 70, bottom - 6, cells["down"][-1].given)
    drawing.arrow(
        (MIDDLE + MIDDLE_WIDTH / 2, bottom),
        (RIGHT, bottom),
        (RIGHT, row(top + len(cells["up"]) - 1) + edge),
    )
    drawing.text(RIGHT - 70, bottom - 6, middle.given)
    _condition(drawing, of["text_encoder"], cells, caption, row, bottom)
    legend = "dashed: skips, joined to what comes from below"
    legend += " · blue: the caption, for every attention" * bool(of["text_encoder"])
    drawing.text(MIDDLE, bottom + 46, legend)
    summary = any(block.name.startswith("add_embedding") for block in of["unet"])
    also = ", and with it a summary of the caption" * summary
    drawing.text(MIDDLE, bottom + 66, f"the time step t goes to every ResNet block{also}")
    again = (LEFT + WIDTH / 2, row(2)), (RIGHT - WIDTH / 2, row(2))
    drawing.arrow(*reversed(again), kind="again")
    drawing.text((MIDDLE + RIGHT - WIDTH / 2) / 2, row(2) - 6, "again, with less noise")
    return drawing.svg(bottom + 76, "the networks of the model, with the shape on every arrow")


def _condition(drawing, text, cells, caption, row, bottom):
    """Draw how the caption gets to the attention layers, in the middle of the U."""
    if not text:
        return
    drawing.box(MIDDLE, row(0), f"“{caption}”" if len(caption) < 30 else "caption", MIDDLE_WIDTH)
    drawing.arrow((MIDDLE, row(0) + HEIGHT / 2), (MIDDLE, row(1) - HEIGHT / 2))
    drawing.text(
        MIDDLE + 50,
        row(0) + PITCH / 2 + 5,
        f"{text[0].taken[0]} tokens" if text[0].taken else "a class",
    )
    drawing.box(MIDDLE, row(1), "text encoder", MIDDLE_WIDTH)
    last = bottom - HEIGHT / 2
    drawing.text(MIDDLE + 42, row(1) + PITCH / 2 + 5, shown(text[-1].given))
    drawing.arrow((MIDDLE, row(1) + HEIGHT / 2), (MIDDLE, last), kind="condition")
    for i, (down, up) in enumerate(zip(cells["down"], reversed(cells["up"]), strict=True)):
        y = row(3 + i) + 10
        if down.attends:
            drawing.arrow((MIDDLE, y), (LEFT + WIDTH / 2, y), kind="condition")
        if up.attends:
            drawing.arrow((MIDDLE, y), (RIGHT - WIDTH / 2, y), kind="condition")
