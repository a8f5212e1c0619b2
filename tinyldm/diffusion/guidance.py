"""Classifier-free guidance: follow the prompt more than the network does by itself."""

from tinyldm.backend import array_module
from tinyldm.diffusion.samplers import Predict


def guided(predict: Predict, guidance: float, rescale: float = 0.0) -> Predict:
    """Classifier-free guidance: a `predict` for a sampler, from one for twice as many samples.

    Of those the first half is predicted without text, the second with it. The result is away from
    the first by `guidance` times the way to the second; 1 is plain conditional (Ho & Salimans 2022,
    eq. 6, with their w = guidance − 1). rescale: 0 none … 1, how far its standard deviation goes
    back to that of the second, against burnt colours (Lin et al. 2023, eq. 15 and 16).
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
