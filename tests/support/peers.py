"""The same networks in diffusers and transformers, in float64, with torch's own gradients.

Each function takes what ours takes, a configuration and {name: array} in our layout, and gives
what ours gives: the output, and one dict with the gradient of every parameter it used and of every
input (under the input's name), for a given gradient `dy` of the output.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel

torch.set_num_threads(1)  # the models are too small to share out

PREFIX = "text_model."  # part of the names in every published file, left out by newer transformers


class InFloat64(TorchFunctionMode):
    """Within it, code that asks for float32 gets float64.

    The reference computes the sinusoids of the time step and the softmax of the pooled text in
    float32, whatever the type of the model, which alone moves its output by 3e-7.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        args = [torch.float64 if x is torch.float32 else x for x in args]
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


# ------------------------------------------------------------------------------------------ layouts


def pixels_to_torch(x):
    """(n, h, w, c) → (n, c, h, w), as a leaf that collects its gradient."""
    return torch.tensor(x.transpose(0, 3, 1, 2)).requires_grad_()


def pixels_to_numpy(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def weight_to_torch(x):
    """Ours (kh, kw, c_in, c_out) → theirs (c_out, c_in, kh, kw); all others are the same."""
    return torch.tensor(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x)


def weight_to_numpy(x):
    x = x.detach().numpy()
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x


def shapes(module, prefix=""):
    """{name: shape} of a module, in our layout."""
    return {
        prefix + name: tuple(x.shape[i] for i in (2, 3, 1, 0)) if x.ndim == 4 else tuple(x.shape)
        for name, x in module.state_dict().items()
    }


# ------------------------------------------------------------------------------------------- models


def unet(config, params, x, t, context, labels, dy):
    module = _load(UNet2DConditionModel.from_config(config), params)
    inputs = {"x": pixels_to_torch(x)}
    if context is not None:
        inputs["context"] = torch.tensor(context).requires_grad_()
    with InFloat64():
        y = module(
            inputs["x"],
            torch.tensor(t),
            inputs.get("context"),
            class_labels=None if labels is None else torch.tensor(labels),
        ).sample
        y.backward(pixels_to_torch(dy))
    return pixels_to_numpy(y), _gradients(module, inputs)


def autoencoder(config, params, method, x, dy, noise=None):
    """`method`: "encode", "decode", "to_latents" or "from_latents"."""
    module = _load(AutoencoderKL.from_config(config), params)
    scale, shift = module.config.scaling_factor, module.config.shift_factor or 0
    x = pixels_to_torch(x)
    if method == "decode":
        y = module.decode(x).sample
    elif method == "from_latents":
        y = module.decode(x / scale + shift).sample
    else:
        gaussian = module.encode(x).latent_dist
        y = gaussian.parameters
        if method == "to_latents":
            z = gaussian.mode()
            if noise is not None:
                z = gaussian.mean + gaussian.std * pixels_to_torch(noise)
            y = (z - shift) * scale
    y.backward(pixels_to_torch(dy))
    return pixels_to_numpy(y), _gradients(module, {"x": x})


def text_module(config):
    # The marks of start and end only matter to the pooled output, which is not used here.
    return CLIPTextModel(CLIPTextConfig(**config, bos_token_id=0, eos_token_id=1))


def text_prefix(module):
    """What the names of this version's modules lack."""
    return "" if any(name.startswith(PREFIX) for name in module.state_dict()) else PREFIX


def text_encoder(config, params, token_ids, dy):
    module = text_module(config)
    prefix = text_prefix(module)
    _load(module, {name.removeprefix(prefix): x for name, x in params.items()})
    with InFloat64():
        y = module(torch.tensor(token_ids)).last_hidden_state
        y.backward(torch.tensor(dy))
    grads = {prefix + name: dw for name, dw in _gradients(module, {}).items()}
    return y.detach().numpy(), grads


def _load(module, params):
    module.double().eval()
    module.load_state_dict({name: weight_to_torch(x) for name, x in params.items()}, strict=True)
    return module


def _gradients(module, inputs):
    grads = {
        name: weight_to_numpy(p.grad) for name, p in module.named_parameters() if p.grad is not None
    }
    for name, x in inputs.items():
        grads[name] = pixels_to_numpy(x.grad) if x.ndim == 4 else x.grad.numpy()
    return grads


# --------------------------------------------------------------------------------------- comparison


seen = {}  # what: the largest differences of outputs and of gradients; conftest.py prints them


def assert_same(what, ours, theirs, output_tol=1e-10, gradient_tol=1e-9):
    """Compare two (output, {name: gradient}), each tensor relative to its own largest number.

    A gradient that is zero by mathematics, such as that of a bias before a softmax, is rounding
    in both and is measured by the largest gradient of the model.
    """
    (y, grads), (expected_y, expected_grads) = ours, theirs
    assert grads.keys() == expected_grads.keys()
    output_error = _difference(y, expected_y, abs(expected_y).max())
    assert output_error <= output_tol, f"output differs by {output_error:.1e}"

    largest = max(abs(dw).max() for dw in expected_grads.values())
    errors = {}
    for name, expected in expected_grads.items():
        size = abs(expected).max()
        errors[name] = _difference(
            grads[name], expected, size if size > 1e-11 * largest else largest
        )
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e <= gradient_tol}
    assert not wrong, f"gradients differ: {wrong}"
    before = seen.get(what, (0, 0))
    seen[what] = max(before[0], output_error), max(before[1], *errors.values())


def _difference(a, b, scale):
    assert a.shape == b.shape and a.dtype == b.dtype == np.float64
    return abs(a - b).max() / scale
