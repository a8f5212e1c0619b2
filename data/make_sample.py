"""Write data/shapes/: the first 24 captioned shapes of seed 0, as a folder to train from."""

import json
from pathlib import Path

from PIL import Image

from tinyldm.data.shapes import make_shapes

folder = Path(__file__).parent / "shapes"
folder.mkdir(exist_ok=True)
lines = []
for i, (image, caption) in enumerate(zip(*make_shapes(24, side=32, seed=0), strict=True)):
    file_name = f"{i:04d}.png"
    Image.fromarray(image).save(folder / file_name)
    lines.append(json.dumps({"file_name": file_name, "text": caption}) + "\n")
(folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
