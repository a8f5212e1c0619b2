"""Classifier-free guidance: follow the prompt more than the network does by itself."""

from tinyldm.backend import array_module
from tinyldm.diffusion.samplers import Predict


def guided(predict: Predict, guidance: float, rescale: float = 0.0) -> Predict:
    """Make a `predict` that returns without + guidance · (with − without) the prompt.

    predict: of twice as many samples, the first half without the prompt, the second with it. At
    guidance 1 the result is plain conditional (Ho & Salimans 2022, eq. 6, with their
    w = guidance − 1). rescale: 0 none … 1, how far the standard deviation returns to that
    with the prompt, against over-saturated colours (Lin et al. 2023, eq. 15 and 16).
    """

    def predict_guided(x, t):
        xp = array_module(x)
        without, with_text = xp.split(predict(xp.concatenate([x, x]), t), 2)
        prediction = without + guidance * (with_text - without)
        if rescale:
            axes = tuple(range(1, x.ndim))
            ratio = with_text.std(axes, keepdims=True) / prediction.std(axes, keepdims=True)
            prediction *= rescale * ratio + (1 - rescale)
        return prediction

    return predict_guided
