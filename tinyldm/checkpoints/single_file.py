"""Stable Diffusion in one file, in the layout and by the names of its first publication.

`model.diffusion_model.…` is the U-Net, `first_stage_model.…` the autoencoder and
`cond_stage_model.…` the text encoder (CompVis/stable-diffusion, Stability-AI/stablediffusion). Such
a file holds neither configs nor a tokenizer: both are inferred from the shapes of its tensors.
"""

import re
import warnings
from pathlib import Path

import numpy as np

from tinyldm.checkpoints.safetensors import match, reshaped, tensor_shapes, tensors
from tinyldm.config import ConfigError
from tinyldm.data.tokenizer import END, Tokenizer
from tinyldm.files import shown, some
from tinyldm.models.autoencoder import AutoencoderKL
from tinyldm.models.text_encoder import TextEncoder
from tinyldm.models.unet import UNet
from tinyldm.nn import no_grad
from tinyldm.nn.protocol import Params

UNET_1 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNET_2 = UNET_1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
TEXT_1 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
}
TEXT_2 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,  # of the 24 in the file: the U-Net attends to the last but one
    "hidden_act": "gelu",
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
# Width of the text → configs of Stable Diffusion 1 and 2, and the padding token of captions.
VERSIONS = {
    768: ({"unet": UNET_1, "vae": VAE, "text_encoder": TEXT_1, "scheduler": SCHEDULER}, END),
    1024: ({"unet": UNET_2, "vae": VAE, "text_encoder": TEXT_2, "scheduler": SCHEDULER}, "!"),
}
LARGE_SIDE = 96  # of the latents that the models of version 2 with v prediction were trained on
MODELS = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": TextEncoder}

UNET = "model.diffusion_model."
TEXT_ROOT = "cond_stage_model."
VAE_ROOTS = ("first_stage_model.", "")  # the second where the file is an autoencoder alone
AVERAGE = "model_ema."  # then the name without "model." and dots: diffusion_modelout0bias
NOT_WEIGHTS = re.compile(  # tables, and tensors that only training needs
    r"[^.]+|model_ema\.(decay|num_updates)|(first_stage_model\.)?loss\..*|.*\.position_ids"
    r"|cond_stage_model\.(transformer\.|model\.)?(logit_scale|text_projection(\.weight)?|attn_mask)"
    r"|cond_stage_model\.model\.visual\..*"
)
STRAY = re.compile(  # what some files hold besides a whole model, and what the model is without
    r"(embedding_manager|denoiser|optimizer\w*|lr_scheduler\w*|safety_checker|lora_\w+)\..*"
)
OTHERS = {  # part of a name → what kind of file has it
    "control_model.": "a ControlNet",
    "depth_model.": "a depth-conditioned model",
    "conditioner.": "Stable Diffusion XL",
    "label_emb.": "a class-conditional model (XL, or an upscaler)",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
}
PARTS = {  # the same of files that hold less than a model
    "lora_": "a LoRA",
    "down_blocks.": "a component of a diffusers folder, which is read with its folder,",
}
PER_LEVEL = 3  # blocks of the U-Net that count as one level, of which the third changes the size
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
AROUND = {  # in the U-Net, before and after the blocks
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
IN_VAE = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "norm_out": "conv_norm_out",
}
IN_ATTENTION = {  # of the VAE: in later files, and in diffusers' of then
    "mid.attn_1": "mid_block.attentions.0",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
IN_OPEN_CLIP = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
THREE = [f"self_attn.{part}_proj" for part in "qkv"]  # they share one tensor


def load_original(
    file: str | Path, with_vae: bool = True
) -> tuple[dict[str, dict], dict[str, Params], Tokenizer]:
    """Load configs, float32 weights and tokenizer of a Stable Diffusion 1 or 2 from one file.

    Averaged weights (`model_ema.…`) are preferred to those of the last step, where the file has
    both. with_vae: read the autoencoder, too. Raises FileNotFoundError, WeightsError, or
    ConfigError for another kind of model.
    """
    shapes = tensor_shapes(file)
    configs, pad_token = _recognise(shapes, file)
    if stray := sorted(name for name in shapes if STRAY.fullmatch(name)):
        shapes = {name: shapes[name] for name in shapes.keys() - set(stray)}
        warnings.warn(f"{file}: {len(stray)} tensors are not used: {some(stray)}", stacklevel=4)
    needed = [(TEXT_ROOT, "text encoder", "; it is a U-Net for the folder of a whole model")]
    if with_vae:
        needed.append((VAE_ROOTS[0], "autoencoder", "; name one with --vae"))
    for root, part, way in needed:
        if not any(name.startswith(root) for name in shapes):
            raise ConfigError(f"{shown(file)}: holds no {part} ({root}…){way}")
    if not with_vae:
        shapes = {n: shape for n, shape in shapes.items() if not n.startswith(VAE_ROOTS[0])}
    expected = {
        f"{component}/{name}": shape
        for component, model in MODELS.items()
        if component != "vae" or with_vae
        for name, shape in model(configs[component]).shapes().items()
    }
    params = _read(file, _places(shapes, configs), expected)
    of = {component: {} for component in MODELS if component != "vae" or with_vae}
    for name, x in params.items():
        component, _, our = name.partition("/")
        of[component][our] = x
    tokenizer = Tokenizer.clip(pad_token)
    prediction = _measure_prediction(configs, of, tokenizer)
    configs["scheduler"]["prediction_type"] = prediction
    if prediction == "v_prediction":
        configs["unet"]["sample_size"] = LARGE_SIDE
    return configs, of, tokenizer


def load_original_vae(file: str | Path) -> tuple[dict, Params]:
    """Load config and float32 weights of an autoencoder file, or of the autoencoder of a model.

    Raises FileNotFoundError or WeightsError.
    """
    shapes = tensor_shapes(file)
    root = VAE_ROOTS[not any(name.startswith(VAE_ROOTS[0]) for name in shapes)]
    places = {
        name: [f"vae/{_vae_name(name.removeprefix(root), len(VAE['block_out_channels']))}"]
        for name in shapes
        if name.startswith(root) and not NOT_WEIGHTS.fullmatch(name) and AVERAGE not in name
    }
    expected = {f"vae/{name}": shape for name, shape in AutoencoderKL(VAE).shapes().items()}
    params = _read(file, places, expected)
    return dict(VAE), {name.removeprefix("vae/"): x for name, x in params.items()}


def _recognise(shapes, file):
    """Recognise the version of Stable Diffusion → configs, padding token."""
    widths = shapes.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())
    kernel = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    known = len(widths) == 2 and widths[1] in VERSIONS and len(kernel) == 4
    others = OTHERS if known else OTHERS | PARTS
    names = sorted(shapes)
    kinds = [kind for part, kind in others.items() if any(part in name for name in names)]
    if not known or kinds:
        raise ConfigError(
            f"{shown(file)}: not a whole Stable Diffusion 1 or 2, but "
            f"{kinds[0] if kinds else 'a file'} of {len(names)} tensors, "
            f"{shown(names[0]) if names else 'none'} and so on; expected "
            f"{UNET}… with attention to text of width {' or '.join(map(str, VERSIONS))}"
        )
    configs, pad_token = VERSIONS[widths[1]]
    configs = {component: dict(config) for component, config in configs.items()}
    configs["unet"]["in_channels"] = kernel[2]
    return configs, pad_token


def _places(shapes, configs):
    """Map names in the file to [component/name in memory, …], several for a shared tensor."""
    places = {}
    levels = len(configs["vae"]["block_out_channels"])
    layers = configs["text_encoder"]["num_hidden_layers"]
    for name in shapes:
        if NOT_WEIGHTS.fullmatch(name) or name.startswith(AVERAGE):
            continue
        if name.startswith(UNET):
            stored = AVERAGE + name.removeprefix("model.").replace(".", "")
            stored = stored if stored in shapes else name
            places[stored] = [f"unet/{_unet_name(name.removeprefix(UNET))}"]
        elif name.startswith("first_stage_model."):
            places[name] = [f"vae/{_vae_name(name.removeprefix('first_stage_model.'), levels)}"]
        elif name.startswith("cond_stage_model.transformer."):
            our = name.removeprefix("cond_stage_model.transformer.").removeprefix("text_model.")
            places[name] = [f"text_encoder/text_model.{our}"]
        elif name.startswith("cond_stage_model.model."):
            ours = _open_clip_names(name.removeprefix("cond_stage_model.model."), layers)
            if ours:
                places[name] = [f"text_encoder/{our}" for our in ours]
        else:
            places[name] = [name]  # unknown to every model; the error names it
    return places


def _read(file, places, expected):
    """Read the tensors → {component/name: array}, checked against `expected`."""
    params = {}
    for name, x in tensors(file, "float32", places):
        names = places[name]
        fused = len(names) > 1 and x.ndim > 0 and len(x) % len(names) == 0
        parts = np.split(x, len(names)) if fused else [x]
        for our, part in zip(names, parts, strict=False):
            params[our] = reshaped(part, expected.get(our))
    match({name: x.shape for name, x in params.items()}, expected, file)
    return params


def _unet_name(name):
    block = re.fullmatch(r"(in|out)put_blocks\.(\d+)\.(\d)\.(.+)", name)
    if block and not name.startswith("input_blocks.0."):
        down, part, rest = block[1] == "in", block[3], block[4]
        level, i = divmod(int(block[2]) - down, PER_LEVEL)
        side = f"{'down' if down else 'up'}_blocks.{level}"
        if rest.startswith(("op.", "conv.")):
            sampler = "downsamplers" if down else "upsamplers"
            return f"{side}.{sampler}.0.conv.{rest.partition('.')[2]}"
        name = f"{side}.{'attentions' if part == '1' else 'resnets'}.{i}.{rest}"
    return _renamed(name, AROUND | RESNET)


def _vae_name(name, levels):
    name = re.sub(r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets.", name)
    name = re.sub(r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.", name)
    if up := re.fullmatch(r"decoder\.up\.(\d+)\.(.+)", name):  # counted from the finest level there
        rest = _renamed(up[2], {"block": "resnets", "upsample": "upsamplers.0"})
        name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{rest}"
    name = _renamed(name, IN_VAE | {"nin_shortcut": "conv_shortcut"})
    return _renamed(name, IN_ATTENTION)


def _open_clip_names(name, layers):
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if layer is None:
        return [_renamed(name, IN_OPEN_CLIP)]
    if int(layer[1]) >= layers:
        return []
    root, rest = f"text_model.encoder.layers.{layer[1]}", _renamed(layer[2], IN_OPEN_CLIP)
    if fused := re.fullmatch(r"attn\.in_proj_(weight|bias)", rest):
        return [f"{root}.{part}.{fused[1]}" for part in THREE]
    return [f"{root}.{rest}"]


def _renamed(name, names):
    """Replace whole words between dots in `name`."""
    for old, new in names.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


def _measure_prediction(configs, params, tokenizer):
    """Determine what the U-Net predicts, ε or v, which the file does not say.

    At the last time step x is nearly ε, and so is a prediction of ε. The best prediction of v there
    is uncorrelated with x: for latents of variance 1, a ε − s x_0 and a x_0 + s ε are.
    """
    unet, text = UNet(configs["unet"]), TextEncoder(configs["text_encoder"])
    c = unet.config
    side = c.sample_size // 2
    x = np.random.default_rng(0).standard_normal((1, side, side, c.in_channels), np.float32)
    latents = c.out_channels
    x[..., latents : latents + 1] = 1  # for inpainting: everything is masked
    x[..., latents + 1 :] = 0
    with no_grad():
        context, _ = text(params["text_encoder"], tokenizer([""]))
        t = np.full(1, configs["scheduler"]["num_train_timesteps"] - 1)
        y, _ = unet(params["unet"], x, t, context)
    x = x[..., :latents]
    return "epsilon" if (x * y).mean() > 0.5 * (x * x).mean() else "v_prediction"
