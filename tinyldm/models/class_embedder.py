"""The class of an image as one token, to which a U-Net attends as it would to a text.

Rombach et al. 2022, section 3.3. A U-Net with `num_class_embeds` adds an embedding of the class to
its time step instead (Dhariwal & Nichol 2021) and needs the ids alone.
"""

from tinyldm.backend import Array
from tinyldm.config import read_config
from tinyldm.nn.layers import Embedding, Layer
from tinyldm.nn.protocol import Backward, Params

DEFAULTS = {"num_classes": 1001, "hidden_size": 512}  # ImageNet's, and the unconditional class


class ClassEmbedder(Layer):
    """Embed classes: class_embedder(params, labels (n,)) → tokens (n, 1, d), and backward.

    config: num_classes, the unconditional class included, and hidden_size, d.
    """

    def __init__(self, config: dict):
        self.config = c = read_config("text_encoder config", config, DEFAULTS, {})
        self.embedding = Embedding("embedding", c.num_classes, c.hidden_size, std=1.0)

    def __call__(self, params: Params, labels: Array) -> tuple[Array, Backward]:
        """Look up labels; backward(dy, grads) → None: no gradient. ValueError for other shapes."""
        if labels.ndim != 1:
            raise ValueError(f"class_embedder: expected labels (n,), found {labels.shape}")
        y, embedding_back = self.embedding(params, labels)

        def backward(dy, grads):
            embedding_back(dy[:, 0], grads)

        return y[:, None], backward
