"""A classifier of a run's own images, whose features compare generated with real images.

The field compares images in the features of a network that was trained on photographs (Heusel et
al. 2017) and has to be downloaded. This one learns in seconds, from the captions of the run: the
five attributes of the built-in shapes, or else which caption an image has. It is kept in the run's
folder as one file, written whole or not at all, whose header says what it was trained on.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tinyldm.backend import Array, to_device
from tinyldm.checkpoints.safetensors import (
    WeightsError,
    load_metadata,
    load_weights,
    match,
    save_weights,
)
from tinyldm.data.dataset import Dataset
from tinyldm.data.images import from_uint8
from tinyldm.data.shapes import ATTRIBUTES, attributes_in
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.models.classifier import Classifier
from tinyldm.nn import functional as F
from tinyldm.nn import no_grad
from tinyldm.nn.optim import adam_state, adamw, clip_factor, global_norm, learning_rate
from tinyldm.nn.protocol import Backward, Params
from tinyldm.threads import map_batch
from tinyldm.training.preparation import Say
from tinyldm.training.step import gradient

SECONDS = 30.0  # of training, where nothing else is asked for
FILE = "training/classifier.safetensors"  # in the folder of the run
FEWEST, MOST = 4, 1000  # images to a word, on average; words of an attribute
LEAST = 8  # pixels of a side, that the levels halve
SIDE = 16  # pixels, at least, that the first convolution leaves of a side that has as many
BATCH, RATE, MAX_NORM, EMA = 64, 3e-3, 1.0, 0.99
TICKS, WARMUP = 10_000, 300  # of the learning rate, whether it goes by steps or by seconds


@dataclass(frozen=True)
class Notes:
    """Notes in a classifier's file. accuracy: the share of held-out images it is right on."""

    config: dict
    accuracy: float
    seconds: float  # of training
    data: str  # fingerprint of the images and captions


@dataclass(frozen=True)
class TrainedClassifier:
    """A trained classifier."""

    notes: Notes
    params: Params
    device: str

    def features(self, images: np.ndarray) -> np.ndarray:
        """Compute features of uint8 (n, height, width, 3) → float64 (n, d), on the host."""
        model = Classifier(self.notes.config)
        pooled = _pooled(model, self.params, images, self.device)
        return to_device(pooled, "cpu").astype(np.float64)

    def maps(self, images: Array) -> tuple[list[Array], Backward]:
        """Return the feature maps of images (n, height, width, 3) in −1…1, for a perceptual loss.

        backward(the gradients of the maps) → dimages.
        """
        maps, maps_back = Classifier(self.notes.config).features(self.params, images)
        return maps, lambda dmaps: maps_back(dmaps, None)


def _pooled(model, params, images, device):
    """Compute the features of uint8 images, on the device, in parts."""

    def part(x):
        with no_grad():
            return model.pooled(params, from_uint8(x))[0]

    return map_batch(part, to_device(images, device))


def classifier_of(
    run: Path,
    training: Dataset,
    held_out: Dataset,
    data: str,
    seconds: float,
    seed: int = 0,
    device: str = "cpu",
    say: Say = print,
) -> TrainedClassifier | None:
    """Return the run's classifier: the one in its folder, or else one trained now and saved there.

    data: fingerprint of the images and captions. One trained on others, or for
    less than `seconds`, is replaced. None where the captions say too little, or for 0 seconds.
    WeightsError for a file that is damaged.
    """
    if not seconds:
        return None
    file = run / FILE
    if file.exists():
        classifier = load_classifier(file, device)
        if classifier.notes.data == data and classifier.notes.seconds >= seconds:
            return classifier
    classifier = fit_classifier(
        training, held_out, seconds, seed=seed, device=device, data=data, say=say
    )
    if classifier:
        save_classifier(file, classifier)
    return classifier


# ------------------------------------------------------------------------------------- its training


def fit_classifier(
    training: Dataset,
    held_out: Dataset,
    seconds: float = SECONDS,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    data: str = "",
    say: Say = print,
) -> TrainedClassifier | None:
    """Train a classifier for `seconds`, or exactly `steps`: then equal seeds give equal weights.

    None where the captions distinguish nothing or too much, or no held-out image is left.
    """
    n = len(training)
    said = attributes_of([*training.captions, *held_out.captions])
    words = {name: sorted(set(column[:n])) for name, column in said.items()}
    words = {name: seen for name, seen in words.items() if len(seen) > 1}
    if min(training.images.shape[1:3]) < LEAST:
        say(f"no classifier: the images are smaller than {LEAST} pixels")
        return None
    if not words or not len(held_out) or max(map(len, words.values())) > min(MOST, n // FEWEST):
        say("no classifier: the captions are all equal, or have too few images each")
        return None
    labels = np.array([_indices(said[name], seen) for name, seen in words.items()]).T
    side = min(training.images.shape[1:3])
    halvings = max(0, int(math.log2(side / SIDE)))
    config = {"classes": words, "stride": 2**halvings}
    say(f"a classifier is trained to predict from images: {', '.join(words)}")
    model = Classifier(config)
    fresh = to_device(model.init(np.random.default_rng((seed, 6))), device)
    params = Flat(fresh, shared=True)
    moments = {moment: Flat(zeros) for moment, zeros in adam_state(params).items()}
    average = params.copy()
    begun, step, done = time.monotonic(), 0, 0.0
    with gradient(classifier_loss(model), params) as gradient_of:
        while done < 1:
            chosen = np.random.default_rng((seed, 6, step)).integers(0, n, BATCH)
            batch = training.images[chosen], labels[chosen]
            _, grads = gradient_of(tuple(to_device(x, device) for x in batch))
            rate = learning_rate(int(done * TICKS), TICKS, RATE, WARMUP)
            scale = clip_factor(global_norm(grads), MAX_NORM)
            adamw(params, grads, moments, average, step, rate, scale, ema=EMA)
            step += 1
            done = step / steps if steps else (time.monotonic() - begun) / seconds
    trained = {name: w.copy() for name, w in average.items()}
    accuracy = _accuracy(model, trained, held_out.images, labels[n:], device)
    say(f"classifier right on {accuracy:.1%} of {len(held_out)} held-out images ({step} steps)")
    return TrainedClassifier(
        Notes(config, accuracy, 0.0 if steps else seconds, data), trained, device
    )


def attributes_of(captions: Sequence[str]) -> dict[str, list[str]]:
    """Return {attribute: its word in each caption} of the shapes, or else {"caption": captions}."""
    try:
        said = [attributes_in(caption) for caption in captions]
    except ValueError:
        return {"caption": list(captions)}
    return {
        name: [one[name] for one in said] for name in ATTRIBUTES if all(name in w for w in said)
    }


def _indices(column, words):
    """Return the index of each word of the column in words, −1 for one unseen in training."""
    at = {word: i for i, word in enumerate(words)}
    return [at.get(word, -1) for word in column]


def classifier_loss(model: Classifier) -> Callable:
    """Make the cross entropy summed over attributes, of uint8 images and labels (n, attributes)."""

    def loss_fn(params, images, labels):
        logits, model_back = model(params, from_uint8(images))
        losses, backs = zip(
            *(F.cross_entropy(y, labels[:, i]) for i, y in enumerate(logits)), strict=True
        )

        def backward(grads):
            model_back([loss_back() for loss_back in backs], grads)

        return sum(losses), backward

    return loss_fn


def _accuracy(model, params, images, labels, device):
    """Compute the share of images on which every attribute is right."""
    pooled = _pooled(model, params, images, device)
    right = np.ones(len(images), bool)
    for head, column in zip(model.heads, labels.T, strict=True):
        with no_grad():
            logits, _ = head(params, pooled)
        right &= to_device(logits, "cpu").argmax(axis=1) == column
    return float(right.mean())


# ----------------------------------------------------------------------------------------- its file


def save_classifier(file: str | Path, classifier: TrainedClassifier) -> None:
    """Write a classifier to a file, whole or not at all."""
    notes = {"tinyldm": json.dumps(asdict(classifier.notes))}
    save_weights(file, to_device(classifier.params, "cpu"), notes)


def load_classifier(file: str | Path, device: str = "cpu") -> TrainedClassifier:
    """Read what `save_classifier` wrote. WeightsError for a damaged file or another's."""
    try:
        notes = Notes(**json.loads(load_metadata(file)["tinyldm"]))
        params = load_weights(file)
        shapes = Classifier(notes.config).shapes()
        match({name: w.shape for name, w in params.items()}, shapes, file)
    except WeightsError as error:
        raise WeightsError(f"{error}; {_MENDED}") from None
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"{file}: not a classifier, or of another version: {error}; {_MENDED}"
        ) from None
    return TrainedClassifier(notes, to_device(params, device), device)


_MENDED = "remove it, and `tinyldm eval` trains another"
