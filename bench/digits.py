"""Real images: scikit-learn's 1,797 handwritten digits, and whether generated ones are recognised.

python -m bench.digits make FOLDER       # 32×32 pixels, a folder by class
tinyldm train --data FOLDER --preset demo --minutes 5 --out RUN
python -m bench.digits score RUN         # by an SVM that has learnt all real ones
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tinyldm.sampling.pipeline import Pipeline

SIDE, HIGHEST = 32, 16  # pixels; levels of the data set
COUNT, BATCH = 500, 50  # images to generate
TRAINED = 1400  # real images that the SVM learns first, to be tested on the others


def digits() -> tuple[list[Image.Image], np.ndarray]:
    """Return the images, in grey, and their classes (n,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = (data.images * 255 / HIGHEST).round().astype(np.uint8)
    return [Image.fromarray(x).resize((SIDE, SIDE), Image.BICUBIC) for x in levels], data.target


def make(folder: Path) -> None:
    """Write each image into the folder of its class."""
    images, classes = digits()
    for i, (image, name) in enumerate(zip(images, classes, strict=True)):
        (folder / str(name)).mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(folder / str(name) / f"{i}.png")


def score(run: Path) -> None:
    """Print which share of real held-out and of generated images an SVM recognises."""
    from sklearn.svm import SVC

    images, classes = digits()
    rows, order = features(images), np.random.default_rng(0).permutation(len(images))
    learnt, others = order[:TRAINED], order[TRAINED:]
    known = SVC(C=10).fit(rows[learnt], classes[learnt])
    print(f"real images, held out: {known.score(rows[others], classes[others]):.1%}")
    pipeline, svm = Pipeline.load(run), SVC(C=10).fit(rows, classes)
    asked, generated = np.arange(COUNT) % 10, []
    for i in range(0, COUNT, BATCH):
        generated += pipeline([str(name) for name in asked[i : i + BATCH]], seed=1000 + i)
    right = svm.predict(features([image.convert("L") for image in generated])) == asked
    each = ", ".join(f"{name} {right[name::10].mean():.0%}" for name in range(10))
    print(f"generated images: {right.mean():.1%} of {COUNT}; {each}")


def features(images: list[Image.Image]) -> np.ndarray:
    """Return grey pixels in 0…1 as rows."""
    return np.stack([np.asarray(image, float).ravel() / 255 for image in images])


if __name__ == "__main__":
    {"make": make, "score": score}[sys.argv[1]](Path(sys.argv[2]))
