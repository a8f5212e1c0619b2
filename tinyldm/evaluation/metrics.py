"""How good is a model, in numbers."""

import numpy as np
from tqdm import tqdm

from tinyldm.data.shapes import ATTRIBUTES, make_shapes
from tinyldm.evaluation.reader import score

SEED = 20_260_101  # of pictures and captions for scoring: none of them is in a training set
BATCH = 50


def psnr(pictures, truth):
    """Peak signal to noise ratio in dB of each picture, uint8 (n, h, w, 3), averaged over n."""
    error = np.square(pictures.astype(np.float64) - truth).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-10))).mean())


def evaluate_shapes(pipeline, captions=500, steps=None, guidance=None):
    """Score a model of the captioned shapes by the rule-based reader.

    captions: how many to paint, half of them of the combinations held out of training.
    Returns {"reader", "reconstructed", "seen", "held_out": {attribute: share right}, "psnr": dB}.
    """
    side = pipeline.size[0]
    half = max(1, captions // 2)
    truth, truth_captions = make_shapes(half, side, SEED)
    decoded = pipeline.decode(pipeline.encode(truth))
    result = {
        "captions": 2 * half,
        "reader": score(truth, truth_captions),
        "psnr": psnr(decoded, truth),
        "reconstructed": score(decoded, truth_captions),
    }
    with tqdm(total=2 * half, desc="painting", unit="picture", disable=None) as bar:
        for name, held_out in (("seen", False), ("held_out", True)):
            _, prompts = make_shapes(half, side, SEED, held_out)
            pictures = []
            for start in range(0, half, BATCH):
                part = prompts[start : start + BATCH]
                pictures += pipeline(part, steps=steps, guidance=guidance, seed=SEED + start)
                bar.update(len(part))
            result[name] = score([np.asarray(picture) for picture in pictures], prompts)
    return result


def table(result):
    """The result of `evaluate_shapes` as lines of text."""
    rows = {
        "the reader on true pictures": result["reader"],
        "first stage, reconstructions": result["reconstructed"],
        "painted, combinations seen": result["seen"],
        "painted, combinations held out": result["held_out"],
    }
    names = [*ATTRIBUTES, "all"]
    lines = ["right by rule, in %".ljust(32) + "".join(name.rjust(12) for name in names)]
    for title, row in rows.items():
        lines.append(
            title.ljust(32) + "".join(f"{100 * row[name]:.1f}".rjust(12) for name in names)
        )
    lines.append(
        f"first stage: {result['psnr']:.1f} dB PSNR; {result['captions']} captions painted"
    )
    return "\n".join(lines)
