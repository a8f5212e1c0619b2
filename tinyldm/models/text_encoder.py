"""The text encoder: CLIP's causal transformer over tokens (Radford et al. 2021)."""

from types import SimpleNamespace

from tinyldm.backend import Array
from tinyldm.config import ConfigError, read_config
from tinyldm.models.blocks import Attention
from tinyldm.nn.activations import gelu, quick_gelu
from tinyldm.nn.layers import Embedding, Layer, LayerNorm, Linear, Offset
from tinyldm.nn.protocol import Backward, Params

DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
FIXED = {"attention_dropout": [0.0]}
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class TextEncoder(Layer):
    """CLIP's text model: token_ids (n, l) → hidden states after the last norm (n, l, d), backward.

    config: the keys of transformers' CLIPTextConfig; ConfigError names what is not implemented.
    """

    def __init__(self, config: dict):
        self.config = c = read_config(
            "text_encoder config", config, DEFAULTS, FIXED, ignore_unknown=True
        )
        if c.hidden_act not in ACTIVATIONS:
            known = " or ".join(ACTIVATIONS)
            raise ConfigError(
                f"text_encoder config: hidden_act = {c.hidden_act!r} is not implemented, "
                f"only {known}"
            )
        d = c.hidden_size
        root = "text_model"
        # Embeddings start far apart. CLIP starts with 0.02, and trains far longer to separate them.
        self.tokens = Embedding(f"{root}.embeddings.token_embedding", c.vocab_size, d, std=1.0)
        self.positions = Offset(
            f"{root}.embeddings.position_embedding.weight", c.max_position_embeddings, d, std=1.0
        )
        self.layers = [
            EncoderLayer(f"{root}.encoder.layers.{i}", c) for i in range(c.num_hidden_layers)
        ]
        self.norm = LayerNorm(f"{root}.final_layer_norm", d, c.layer_norm_eps)

    def __call__(self, params: Params, token_ids: Array) -> tuple[Array, Backward]:
        """Encode token ids; backward(dy, grads) → None: they have no gradient.

        Raises ValueError for ids that are not (n, l), outside the vocabulary, or too many.
        """
        if token_ids.ndim != 2:
            raise ValueError(f"text_encoder: expected token ids (n, l), found {token_ids.shape}")
        x, token_back = self.tokens(params, token_ids)
        x, position_back = self.positions(params, x)
        layer_backs = []
        for layer in self.layers:
            x, layer_back = layer(params, x)
            layer_backs.append(layer_back)
        y, norm_back = self.norm(params, x)

        def backward(dy, grads):
            dx = norm_back(dy, grads)
            for layer_back in reversed(layer_backs):
                dx = layer_back(dx, grads)
            token_back(position_back(dx, grads), grads)

        return y, backward


class EncoderLayer(Layer):
    """Transformer layer, x (n, l, d): x + attention(norm(x)), then x + mlp(norm(x)). c: config."""

    def __init__(self, name: str, c: SimpleNamespace):
        d = c.hidden_size
        self.norm1 = LayerNorm(f"{name}.layer_norm1", d, c.layer_norm_eps)
        self.attention = Attention(
            name, d, c.num_attention_heads, bias=True, causal=True,
            names=[f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")],
        )  # fmt: skip
        self.norm2 = LayerNorm(f"{name}.layer_norm2", d, c.layer_norm_eps)
        self.fc1 = Linear(f"{name}.mlp.fc1", d, c.intermediate_size)
        self.fc2 = Linear(f"{name}.mlp.fc2", c.intermediate_size, d)
        self.activation = ACTIVATIONS[c.hidden_act]

    def __call__(self, params: Params, x: Array) -> tuple[Array, Backward]:
        h, norm1_back = self.norm1(params, x)
        h, attention_back = self.attention(params, h)
        x1 = x + h
        h, norm2_back = self.norm2(params, x1)
        h, fc1_back = self.fc1(params, h)
        h, activation_back = self.activation(h)
        h, fc2_back = self.fc2(params, h)

        def backward(dy, grads):
            dh = fc1_back(activation_back(fc2_back(dy, grads)), grads)
            dx1 = dy + norm2_back(dh, grads)
            dh, _ = attention_back(dx1, grads)
            return dx1 + norm1_back(dh, grads)

        return x1 + h, backward
