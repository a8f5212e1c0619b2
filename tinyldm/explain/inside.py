"""The chapter on what is inside: every block with its shapes, parameters, time and source."""

import inspect
import itertools
import time
from dataclasses import dataclass

import numpy as np

from tinyldm.backend import Array
from tinyldm.checkpoints.components import make
from tinyldm.evaluation.reverse import start_noise
from tinyldm.explain.subject import Contents, Subject
from tinyldm.models import TextEncoder
from tinyldm.models.coders import Autoencoder, Decoder, Encoder
from tinyldm.models.levels import DownBlock, UNetLayer, UpBlock
from tinyldm.models.unet import UNet
from tinyldm.nn import no_grad
from tinyldm.nn.layers import Layer, Leaf
from tinyldm.nn.protocol import Backward, Params
from tinyldm.threads import one_blas_thread

# What holds blocks; all else is a block.
CONTAINERS = (UNet, DownBlock, UpBlock, UNetLayer, Autoencoder, Encoder, Decoder, TextEncoder)
CALLS = 5  # of which the fastest counts
NAMES = {"vae": "autoencoder", "text_encoder": "text encoder", "unet": "U-Net"}


@dataclass
class Block:
    """One block of a network: what went in and came out of it, and how long that took.

    name: that of its parameters. taken, given: the shapes of one sample, without the batch.
    """

    component: str
    name: str
    layer: Layer
    taken: tuple[int, ...] | None = None
    given: tuple[int, ...] | None = None
    seconds: float = float("inf")

    @property
    def parameters(self) -> int:
        """Count the block's numbers that are learnt."""
        return sum(int(np.prod(shape)) for shape in self.layer.shapes().values())


class Measured(Layer):
    """A layer that notes its shapes and its time in a Block."""

    def __init__(self, block: Block, calls: list[Block]):
        self.block, self.calls = block, calls

    def __getattr__(self, name: str) -> object:
        return getattr(self.block.layer, name)

    def __call__(self, params: Params, x: Array, *others: Array) -> tuple[Array, Backward]:
        """Run the layer."""
        block, began = self.block, time.perf_counter()
        y, backward = block.layer(params, x, *others)
        float(y.ravel()[0])  # waits for a GPU
        block.seconds = min(block.seconds, time.perf_counter() - began)
        if block.taken is None:
            self.calls.append(block)
        block.taken, block.given = x.shape[1:], y.shape[1:]
        return y, backward


def measure(network: Layer, component: str, calls: list[Block]) -> None:
    """Wrap every block of a network, in place; `calls` takes the blocks as they are called."""
    for attribute, value in list(vars(network).items()):
        wrapped = []
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, CONTAINERS):
                measure(child, component, calls)
            elif isinstance(child, Layer):
                child = Measured(Block(component, _name(child), child), calls)
            wrapped.append(child)
        setattr(network, attribute, wrapped if isinstance(value, list) else wrapped[0])


def _name(layer):
    """Return what the names of all parameters of a layer begin with."""
    names = [name.split(".")[:-1] for name in layer.shapes()]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return ".".join(parts[0] for parts in same)


def blocks_of(subject: Subject) -> list[Block]:
    """Run all networks on one sample → their blocks, in the order in which they are called."""
    pipeline, calls = subject.pipeline, []
    networks = {}
    for component in pipeline.params:
        networks[component] = make(component, pipeline.configs[component])
        measure(networks[component], component, calls)
    channels = pipeline.vae.config.in_channels
    image = pipeline.xp.zeros((1, *pipeline.size, channels), "float32")
    ids = pipeline.xp.asarray(pipeline.tokenizer(subject.prompts[:1]))
    x, t = start_noise(pipeline, 1), pipeline.xp.full(1, 500)
    with no_grad(), one_blas_thread():  # two that wait for each other would not be comparable
        for _ in range(CALLS):
            condition = {"labels": ids}
            if "text_encoder" in networks:
                context, _ = networks["text_encoder"](pipeline.params["text_encoder"], ids)
                condition = {"context": context}
            networks["vae"].to_latents(pipeline.params["vae"], image)
            networks["unet"](pipeline.params["unet"], x, t, **condition)
            networks["vae"].from_latents(pipeline.params["vae"], x)
    return calls


def inside(subject: Subject, contents: Contents) -> list[Block]:
    """List the blocks, each with its numbers and the source of its class; → them."""
    blocks = blocks_of(subject)
    facts = [
        {
            "network": NAMES[block.component],
            "name": block.name,
            "kind": _source(block)[0],
            "shapes": f"{shown(block.taken)} → {shown(block.given)}",
            "parameters": block.parameters,
            "ms": round(1000 * block.seconds, 3),
        }
        for block in blocks
    ]
    contents.text("blocks", facts)
    contents.texts["sources"] = {name: text for name, text in map(_source, blocks)}
    return blocks


def _source(block):
    """Return the name of what a block computes, and its source: a function, or classes."""
    if isinstance(block.layer, Leaf):
        function = inspect.unwrap(block.layer.function)
        return function.__name__, inspect.getsource(function)
    classes = [c for c in reversed(type(block.layer).__mro__) if c not in (object, Layer)]
    return type(block.layer).__name__, "\n\n".join(map(inspect.getsource, classes))


def shown(shape: tuple[int, ...]) -> str:
    """Write a shape as 16×16×4."""
    return "×".join(map(str, shape))
