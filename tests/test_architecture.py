"""Who imports whom, and what is said of everything public: read from the sources."""

import ast
import graphlib
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each package is for, in import order: a package imports itself and those above it alone.
PACKAGES = {
    "backend config files lock machine options progress threads": "the array switch, the machine",
    "data": "images with captions, and captions as tokens",
    "nn": "the mathematics of layers, plain and complete",
    "kernels": "faster versions of plain functions",
    "models": "the networks of Stable Diffusion",
    "diffusion": "noise schedules, losses and samplers: arrays and callables, never a network",
    "checkpoints": "models on disk",
    "sampling": "from a prompt to images",
    "evaluation": "how good the images are",
    "training": "both stages, and the state that survives anything",
    "experiments": "claims of the field at small scale",
    "explain": "pages that show what a run has learnt",
    "testing pytest_plugin": "gradient checks for everyone",
    "exercises": "lines of the source to write yourself",
    "cli __main__": "the command line",
}
CORE, CORE_LINES = ("nn", "models", "diffusion"), 2500  # that one reads in an afternoon
LEVELS = {name: i for i, names in enumerate(PACKAGES) for name in names.split()}

# Outside nn/ and kernels/ the library of an array is asked for here and nowhere else. The list
# may get shorter.
ASK_FOR_THE_LIBRARY = """
    threads models.autoencoder models.vq
    diffusion.schedule diffusion.loss diffusion.samplers diffusion.guidance
    sampling.init_image sampling.tiling sampling.pipeline evaluation.likelihood
    training.networks training.latents training.codebook training.adversarial
    training.snapshots training.stages training.step
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


def package(module):
    return module.partition(".")[0]


def test_every_module_is_in_a_package_of_the_table():
    assert {package(module) for module in MODULES} == LEVELS.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_upwards_only(module):
    # `from tinyldm import __version__`: the root package is loaded before all others anyway.
    below = {
        f"{module} imports {other}: {PACKAGES[list(PACKAGES)[LEVELS[package(other)]]]}"
        for other in own_imports(module) - {""}
        if LEVELS[package(other)] > LEVELS[package(module)]
    }
    assert not below


def test_no_modules_import_each_other():
    graph = {module: own_imports(module) - {""} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # which raises


def test_the_core_is_plain():
    """Only the package of the networks, when it is loaded, brings in what makes them fast."""
    for module in MODULES:
        if package(module) in CORE and module != "models":
            kernels = {other for other in own_imports(module) if package(other) == "kernels"}
            assert not kernels, module


def code_lines(text):
    """Count the lines that hold code: no blanks, comments or docstrings."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*layout, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_core_is_read_in_an_afternoon():
    sizes = {module: code_lines(sources()[module]) for module in MODULES if package(module) in CORE}
    total = sum(sizes.values())
    assert total <= CORE_LINES, (
        f"{', '.join(CORE)} have {total} lines of code, at most {CORE_LINES} are to be read in an "
        "afternoon: speed belongs in kernels/, file formats in checkpoints/"
    )


def test_the_root_package_waits_to_be_asked():
    top_level = trees()[""].body
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in top_level)


def test_diffusion_never_sees_a_network():
    for module in MODULES:
        if package(module) == "diffusion":
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
    outside = {m for m in ask - {"backend"} if package(m) not in ("nn", "kernels")}
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
