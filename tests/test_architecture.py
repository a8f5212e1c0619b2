"""Who imports whom, and what is said of everything public: read from the sources."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only modules above it. A package stands where its `__init__` is loaded; the root
# package imports nothing until it is asked for something.
ORDER = """
    backend team config files machine
    nn.protocol nn nn.pieces nn.activations nn.functional nn.quantize nn.norms nn.windows
    nn.winograd nn.conv nn.attention nn.layers nn.gradcheck
    models.weights models.tokenizer models.tiles
    models.context models.blocks models.levels models.unet models.coders models.autoencoder
    models.vq models.identity models.discriminator models.text_encoder models.classes
    models.classifier
    models models.original
    diffusion diffusion.schedule diffusion.objective diffusion.noise diffusion.solvers
    diffusion.samplers
    checkpoints predictor pixels recipe tasks scene pipeline
    data data.dataset data.shapes data.folder data.formats
    again
    evaluation evaluation.reader evaluation.statistics evaluation.likelihood evaluation.scenes
    evaluation.metrics evaluation.pictures
    training training.optim training.parallel training.config training.presets training.signals
    training.state
    training.losses training.stages training.latents training.codebook training.rehearsal
    training.snapshots
    training.preparation training.classifier training.loop training.runs training.overfit
    experiments experiments.scoring experiments.trained experiments.guidance
    experiments.latent_vs_pixel experiments.samplers experiments.schedules
    painting commands doctor arguments cli __main__
""".split()

# Outside nn/ the library of an array is asked for here and nowhere else. The list may get shorter.
ASK_FOR_THE_LIBRARY = """
    models.autoencoder models.tiles
    diffusion.schedule diffusion.objective diffusion.samplers
    predictor scene evaluation.likelihood pipeline
    training.optim training.stages training.latents training.codebook
    training.snapshots training.runs
""".split()

LONGEST = 350  # lines

# What takes long to load, and is not needed to say "usage:".
HEAVY = ("numpy", "scipy", "PIL", "safetensors", "tqdm", "threadpoolctl", "cupy")


@cache
def sources():
    """{name of the module without "tinyldm.": its text}; the root package is ""."""
    found = {}
    for file in (ROOT / "tinyldm").rglob("*.py"):
        parts = file.relative_to(ROOT / "tinyldm").with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = file.read_text(encoding="utf-8")
    return found


@cache
def trees():
    """{name of the module: its syntax}."""
    return {module: ast.parse(text) for module, text in sources().items()}


def imported(tree):
    """(module, name or None) of everything that is imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            yield from ((node.module, alias.name) for alias in node.names)


def own_imports(module):
    """The modules of tinyldm that `module` imports: `from tinyldm.nn import conv` is nn.conv."""
    found = set()
    for where, name in imported(trees()[module]):
        top, _, rest = where.partition(".")
        if top == "tinyldm":
            inner = f"{rest}.{name}".removeprefix(".")
            found.add(inner if inner in trees() else rest)
    return found


MODULES = sorted(trees().keys() - {""})


def test_every_module_has_its_place():
    assert len(set(ORDER)) == len(ORDER)
    assert MODULES == sorted(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_upwards_only(module):
    allowed = set(ORDER[: ORDER.index(module)])
    # `from tinyldm import __version__`: the root package is loaded before all others anyway.
    assert own_imports(module) - {""} <= allowed


def test_the_root_package_waits_to_be_asked():
    top_level = trees()[""].body
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in top_level)


def test_diffusion_never_sees_a_network():
    for module in MODULES:
        if module.startswith("diffusion"):
            assert not any(
                where.startswith("tinyldm.models") for where, _ in imported(trees()[module])
            ), module


def test_only_the_backend_knows_cupy():
    know = set()
    for module, tree in trees().items():
        modules = [where for where, _ in imported(tree)]
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        if any(re.fullmatch(r"cupyx?(\.[\w.]+)?", text) for text in modules + texts):
            know.add(module)
    assert know == {"backend"}


def test_who_asks_for_the_library_of_an_array():
    ask = {
        module
        for module, tree in trees().items()
        if any(getattr(node, "id", "") == "array_module" for node in ast.walk(tree))
    }
    outside = {module for module in ask - {"backend"} if not module.startswith("nn.")}
    assert sorted(outside) == sorted(ASK_FOR_THE_LIBRARY)


def test_no_module_is_for_odds_and_ends():
    words = {word for module in trees() for word in module.split(".")}
    assert words.isdisjoint({"utils", "util", "helpers", "helper", "misc", "common", "tools"})


def test_files_are_short():
    lines = {module: len(text.splitlines()) for module, text in sources().items()}
    assert not {name: n for name, n in lines.items() if n > LONGEST}


def methods(cls):
    return [node for node in cls.body if isinstance(node, ast.FunctionDef)]


@cache
def documented_methods():
    """(class, method) of every method that has a docstring."""
    nodes = (node for tree in trees().values() for node in ast.walk(tree))
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    return {(c.name, m.name) for c in classes for m in methods(c) if ast.get_docstring(m)}


def unhinted(function):
    """The names of what has no hint: parameters, and "return"."""
    args = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    names = [a.arg for a in args if not a.annotation and a.arg not in ("self", "cls")]
    returns = function.returns or function.name == "__init__"
    return names if returns else [*names, "return"]


def lacking(module):
    """What a public function, class or method of a module does not say."""
    tree = trees()[module]
    if not ast.get_docstring(tree):
        yield "a docstring"
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{node.name}: a docstring"
        if isinstance(node, ast.FunctionDef):
            yield from (f"{node.name}: {name}" for name in unhinted(node))
            continue
        bases = [getattr(base, "id", "") for base in node.bases]
        for method in methods(node):
            label = f"{node.name}.{method.name}"
            if not method.name.startswith("_") or method.name in ("__init__", "__call__"):
                yield from (f"{label}: {name}" for name in unhinted(method))
            # What overrides a documented method does the same.
            documented = {(name, method.name) for name in [node.name, *bases]}
            if not method.name.startswith("_") and documented.isdisjoint(documented_methods()):
                yield f"{label}: a docstring"


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_hints_and_a_docstring(module):
    assert list(lacking(module)) == []


@pytest.mark.parametrize("module", ["tinyldm", "tinyldm.cli"])
def test_importing_is_light(module):
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
