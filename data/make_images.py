"""Write data/images/ again: `python data/make_images.py RUN`, of a finished run of the demo.

It copies the run's images of the course, draws the plots and the diagram, and notes the checksum of
every image in manifest.json. The images of tasks and experiments, and the map of gradients, have
commands of their own, which README.md beside the images tells; their checksums are renewed, too.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from tinyldm.evaluation.plots import save_plot
from tinyldm.experiments.schedules import noise_schedules
from tinyldm.explain.diagram import diagram
from tinyldm.explain.inside import blocks_of
from tinyldm.explain.subject import Subject
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training.preparation import load_data, split
from tinyldm.training.state import load_notes

OF_THE_RUN = (
    "data", "forward", "reconstructions", "samples", "words", "reverse", "guidance", "loss-by-noise"
)  # fmt: skip

run, folder = Path(sys.argv[1]), Path(__file__).parent / "images"
for name in OF_THE_RUN:
    shutil.copyfile(run / "samples" / f"{name}.png", folder / f"{name}.png")
save_plot(folder / "schedules.png", noise_schedules())
config = load_notes(run)["config"]
training, held_out = split(load_data(config), config)
subject = Subject(run, Pipeline.load(run), training, held_out, [training.captions[0]])
drawn = diagram(blocks_of(subject), training.captions[0])
(folder / "diagram.svg").write_text(drawn, encoding="utf-8")
files = sorted(file for file in folder.iterdir() if file.suffix in (".png", ".svg"))
sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
(folder / "manifest.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
