"""The scores of a model: what is stated as their standard error is how far other seeds are away."""

import numpy as np
import pytest
from small_model import make_pipeline

from tinyldm.data.dataset import Dataset
from tinyldm.data.shapes import make_shapes
from tinyldm.evaluation.metrics import Scores, evaluate

SEEDS = 12


def drawn(n, seed):
    images, captions = make_shapes(n, 16, seed)
    return Dataset(images, captions, [""] * n, readable=True)


def flat(scores, before=""):
    """{"name.name": number} of nested dicts and lists."""
    found = {}
    for name, value in scores.items() if isinstance(scores, dict) else enumerate(scores):
        if isinstance(value, (dict, list)):
            found |= flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


def test_scores_and_their_errors_lie_under_the_same_names():
    scores = Scores()
    scores.add((np.float32(1.5), np.float64(0.1)), "a")
    scores.add(([1, 2.0], (np.inf, 0.5)), "b", "c")
    scores.add_shares({"x": 1.0, "y": 0.5}, 96, "d")
    assert scores.values == {"a": 1.5, "b": {"c": [1.0, 2.0]}, "d": {"x": 1.0, "y": 0.5}}
    assert scores.errors["a"] == 0.1 and scores.errors["b"] == {"c": [None, 0.5]}
    assert scores.errors["d"]["y"] == pytest.approx(0.05) and scores.errors["d"]["x"] > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:caption cut")
def test_the_stated_error_is_that_of_other_seeds():
    """With other images, captions and noise; shares of nearly all or nearly none left out."""
    pipeline, training = make_pipeline(), drawn(2000, 1)
    found = []
    for seed in range(SEEDS):
        held_out = drawn(512, 100 + seed)
        result, _ = evaluate(
            pipeline, training, held_out, 120, shapes=lambda caption: caption, seed=seed
        )
        errors = flat(result["error"])
        values = flat({name: result[name] for name in result["error"]})
        found.append((list(values.values()), [np.nan if e is None else e for e in errors.values()]))
    values, stated = (np.array(column, float) for column in zip(*found, strict=True))
    spread, stated = values.std(axis=0, ddof=1), np.sqrt(np.square(stated).mean(axis=0))
    names = list(errors)
    shares = ("reader", "reconstructed", "seen", "held_out", "nearest.copied")
    for name, mean, seen, said in zip(names, values.mean(axis=0), spread, stated, strict=True):
        if not (name.startswith(shares) and not 0.04 < mean < 0.96):
            assert 0.5 < seen / said < 2, (name, mean, seen, said)
    assert len(names) > 40
