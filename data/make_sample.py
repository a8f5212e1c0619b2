"""Write data/shapes/, a folder to train from, and data/examples/, what tasks begin with.

The former are the first 24 captioned shapes of seed 0. The latter are made of one of seed 1, which
no run with the default seed is trained on.
"""

import json
from pathlib import Path

from PIL import Image

from tinyldm.data.shapes import make_shapes
from tinyldm.evaluation.reader import box_around
from tinyldm.sampling.tasks import reduced

folder = Path(__file__).parent / "shapes"
folder.mkdir(exist_ok=True)
lines = []
for i, (image, caption) in enumerate(zip(*make_shapes(24, side=32, seed=0), strict=True)):
    file_name = f"{i:04d}.png"
    Image.fromarray(image).save(folder / file_name)
    lines.append(json.dumps({"file_name": file_name, "text": caption}) + "\n")
(folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")

folder = Path(__file__).parent / "examples"
folder.mkdir(exist_ok=True)
CHOSEN = 5
images, captions = make_shapes(CHOSEN + 1, side=32, seed=1)
maps, _ = make_shapes(CHOSEN + 1, side=32, seed=1, maps=True)
mask = 255 * box_around(images[CHOSEN], margin=4).astype("uint8")
examples = {
    "image.png": images[CHOSEN],
    "small.png": reduced(images[CHOSEN:], 4)[0],
    "mask.png": mask,
    "map.png": maps[CHOSEN],
}
for file_name, pixels in examples.items():
    Image.fromarray(pixels).save(folder / file_name)
(folder / "caption.txt").write_text(captions[CHOSEN] + "\n", encoding="utf-8")
