"""Mutants of all that is not a backward pass: schedules, samplers, optimizer, files, training.

`python -m tests.other_mutants [COUNT] [SEED] [MODULE…]` changes one expression of a module's syntax
tree, runs those tests that pass through its line, and lists the changes that none of them noticed.
COUNT mutants are drawn by the seed; 0 takes all.
"""

import ast
import importlib.machinery
import os
import random
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ |= {
    "TINYLDM_HYPOTHESIS_PROFILE": "mutants", "OPENBLAS_NUM_THREADS": "1", "TINYLDM_PROCESSES": "1",
}  # fmt: skip

from forks import each, in_fork  # noqa: E402

SUITES = {  # module → the files of its tests
    "diffusion/schedule": ["diffusion", "test_golden.py"],
    "diffusion/timesteps": ["diffusion", "test_golden.py"],
    "diffusion/samplers": ["diffusion", "test_golden.py"],
    "diffusion/guidance": ["diffusion", "test_golden.py", "sampling/test_pipeline.py"],
    "diffusion/loss": ["diffusion", "training/test_losses.py"],
    "nn/optim": ["nn/test_optim.py", "nn/test_muon.py", "training/test_step.py"],
    "training/step": [
        "training/test_step.py",
        "training/test_losses.py",
        "training/test_run.py",
        "test_strict.py",
    ],
    "training/loop": [
        "training/test_loop.py",
        "training/test_losses.py",
        "training/test_run.py",
        "training/test_stops.py",
    ],
    "training/losses": ["training/test_losses.py", "training/test_step.py"],
    "training/state": [
        "training/test_step.py",
        "training/test_run.py",
        "training/test_file_faults.py",
    ],
    "files": [
        "checkpoints",
        "sampling/test_pipeline.py",
        "training/test_run.py",
        "data/test_folder.py",
    ],
    "lock": ["training/test_run.py", "training/test_stops.py", "sampling/test_pipeline.py"],
    "checkpoints/safetensors": ["checkpoints", "sampling/test_pipeline.py"],
    "checkpoints/diffusers_folder": [
        "checkpoints",
        "sampling/test_pipeline.py",
        "training/test_run.py",
    ],
}
EXPLAINED = {  # (module, change, line of the source) → why no test can notice it
    ("training/loop", "2  →  4", "total = self.state.total or 2 * MOST_LEFT_OUT"):
        "Half of either is ten steps or more.",
    **{
        (
            "diffusion/loss", change,
            "in_x0 = before * schedule.betas / (2 * (1 - schedule.alphas_bar) ** 2)",
        ): "A factor that the division by the mean takes away."
        for change in (
            "2  →  4", "2 * (1 - schedule.alphas_bar) ** 2  →  (1 - schedule.alphas_bar) ** 2"
        )
    },
    (
        "nn/optim", "g.shape[-2] <= g.shape[-1]  →  g.shape[-2] >= g.shape[-1]",
        "wide = g if g.shape[-2] <= g.shape[-1] else g.swapaxes(-1, -2)",
    ): "Which way is faster; the result is the same.",
    (
        "nn/optim", "-1  →  1", "wide = g if g.shape[-2] <= g.shape[-1] else g.swapaxes(-1, -2)",
    ): "Which way is faster; the result is the same.",
    (
        "nn/optim", "1e-12  →  2e-12",
        "return array_module(norm).minimum(limit / (norm + 1e-12), 1.0)",
    ): "Below what a norm differs by.",
    (
        "nn/optim", "('m', 'v')  →  ('v', 'm')", 'for moment in ("m", "v")',
    ): "The order in a dict.",
    (
        "training/state", "('m', 'v')  →  ('v', 'm')",
        'discriminator_moments={m: groups[f"discriminator_{m}"] for m in ("m", "v")},',
    ): "The order in a dict.",
    (
        "lock", "0.1  →  0.2",
        "time.sleep(0.1)  # in which somebody who only looked, as `is_locked` does, has gone",
    ): "A time to wait.",
    ("files", "_sync(self.file.parent)  →  pass", "_sync(self.file.parent)"): (
        "Only where the power fails is the name lost."
    ),
    ("lock", "os.close(handle)  →  pass",
     "os.close(handle)  # its last holder has removed it in the meantime"): (
        "One handle more, until the process ends."
    ),
    (
        "diffusion/samplers", "('start', 'post_step')  →  ('post_step', 'start')",
        'given = {name: options.pop(name) for name in ("start", "post_step") if name in options}',
    ): "The order in a dict.",
    ("training/loop", "bar.refresh()  →  pass", "bar.refresh()"): "How a bar looks.",
    ("lock", "os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  →  "
     "os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW",
     "flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # for a pipe may never open"):
        "Linux opens a pipe for both at once; another system may wait.",
    ("training/state", "12  →  24",
     'check_kind("its notes", name, notes[name], kind, least, most=10**12)'):
        "Either is more than any run has.",
    ("training/loop",
     "bar.set_postfix(loss=f'{steps.loss:.4f}', refresh=False)  →  pass",
     'bar.set_postfix(loss=f"{steps.loss:.4f}", refresh=False)'): "How a bar looks.",
    ("training/state", "10  →  20",
     'check_kind("its notes", name, notes[name], kind, least, most=10**12)'): (
        "Far above what there is."
    ),
    ("training/state", "-1  →  1", "return self.stage == STAGES[-1] and self.step == self.total"): (
        "There are two stages."
    ),
    (
        "training/state",
        "('discriminator', 'discriminator_m', 'discriminator_v')  →  "
        "('discriminator_m', 'discriminator', 'discriminator_v')",
        'names = ("discriminator", "discriminator_m", "discriminator_v")',
    ): "The order in a dict.",
    ("training/step", "keep_freed_memory()  →  pass", "keep_freed_memory()"): "It is faster.",
    ("lock", "0  →  1", "os.truncate(handle, 0)"): "What is written next is longer.",
    **{
        ("training/loop", change, "smoothing=0.05, dynamic_ncols=True,"): "How a bar looks."
        for change in ("0.05  →  0.1", "True  →  False")
    },
    **{
        ("training/loop", change, "total = state.total or 10**9"): "Far more than steps are taken."
        for change in ("10  →  20", "9  →  18")
    },
    **{
        (
            "training/state", "('params', 'm', 'v', 'average')  →  ('m', 'params', 'v', 'average')",
            f'of_group = dict.fromkeys(("params", "m", "v", "average"), {rest}',
        ): "The order in a dict."
        for rest in ("vae)", 'trained) | {"first_stage": vae}')
    },
    **{
        ("checkpoints/diffusers_folder", "3  →  6", line): "Which line a warning names."
        for line in (
            "stacklevel=3,",
            'warnings.warn(f"{folder / name}: edited since the model was written", stacklevel=3)',
        )
    },
    ("checkpoints/diffusers_folder", "time.sleep(0.05)  →  pass", "time.sleep(0.05)"): (
        "It waits without a rest."
    ),
    **{
        ("checkpoints/safetensors", change, "head = stream.read(2**12)"): (
            "It reads more than it has to."
        )
        for change in ("2  →  4", "12  →  24")
    },
    (
        "checkpoints/safetensors", "0  →  1",
        "crc = _of_header(entries, notes) if checked else 0",
    ): "It is of no use where nothing is checked.",
    **{
        ("lock", "1000  →  2000", line): "What a holder writes is far shorter."
        for line in (
            "content = os.pread(handle, 1000, 0)", "holder = _holder(os.read(handle, 1000))"
        )
    },
    **{
        ("lock", change, "handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)"): (
            "Links and pipes were refused before; only one made in between would be opened."
        )
        for change in (
            "os.O_RDWR | os.O_NOFOLLOW  →  os.O_RDWR",
            "os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK  →  os.O_RDWR | os.O_NOFOLLOW",
        )
    },
}  # fmt: skip
SECONDS = 300  # of processor time for the tests of one mutant: more is noticed, too
KILLED, SURVIVED = "killed", "survived"


@dataclass(frozen=True)
class Mutant:
    """A change in one module: the number of the place among all that can be changed."""

    module: str
    number: int
    line: int
    change: str

    def __str__(self):
        return f"{self.module}, line {self.line}: {self.change}"

    def key(self):
        """Return the key of EXPLAINED for this change."""
        return self.module, self.change, source_of(self.module).splitlines()[self.line - 1].strip()


def source_of(module):
    """The text of a module."""
    return (ROOT / "tinyldm" / f"{module}.py").read_text(encoding="utf-8")


def changes(module):
    """[(what is changed, a function that makes the changed tree)] of all functions in a module."""
    from tinyldm.testing.faults import mutants

    tree = ast.parse(source_of(module))
    within = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return list(mutants(tree, within))


def all_mutants(module):
    """The changes that can be made in a module."""
    return [
        Mutant(module, number, planted.line, planted.change)
        for number, (planted, _) in enumerate(changes(module))
    ]


class Planting:
    """Finds the one module that is to be compiled from a changed tree."""

    def __init__(self, module, tree):
        self.name, self.tree = "tinyldm." + module.replace("/", "."), tree
        self.path = str(ROOT / "tinyldm" / f"{module}.py")

    def find_spec(self, name, path=None, target=None):
        """Return the spec of the module, with a loader that has the changed code."""
        if name != self.name:
            return None
        code = compile(self.tree, self.path, "exec")
        loader = importlib.machinery.SourceFileLoader(name, self.path)
        loader.get_code = lambda name: code
        return importlib.machinery.ModuleSpec(name, loader, origin=self.path)


class Recorder:
    """Notes which tests pass through which lines of a file, and what they take."""

    def __init__(self, path):
        self.path, self.lines, self.seconds = path, defaultdict(set), {}
        self.of_fixtures = set()  # lines; a fixture may be shared with later tests

    def trace(self, frame, event, _):
        """Trace the frames of that file alone."""
        if frame.f_code.co_filename != self.path:
            return None
        self.seen.add(frame.f_lineno)
        return self.trace

    def pytest_runtest_logstart(self, nodeid):
        """Begin to record a test, with its fixtures."""
        self.seen, self.begun = set(), time.monotonic()
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def pytest_runtest_call(self, item):
        """Go on to the test itself."""
        self.of_fixtures |= self.seen

    def pytest_runtest_logfinish(self, nodeid):
        """End it."""
        sys.settrace(None)
        self.seconds[nodeid] = time.monotonic() - self.begun
        for line in self.seen:
            self.lines[line].add(nodeid)


def run_tests(arguments, *plugins):
    """Run pytest from the project's folder → whether all passed."""
    import pytest

    os.chdir(ROOT)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tinyldm"]:
        del sys.modules[name]  # all is loaded anew, with what is planted
    options = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain"]
    return pytest.main([*options, *arguments], plugins=list(plugins)) == 0


def tests_of(module):
    """Run a module's tests once → {line: what to run for it, the fastest first}."""
    files = [f"tests/{file}" for file in SUITES[module]]

    def work():
        recorder = Recorder(str(ROOT / "tinyldm" / f"{module}.py"))
        assert run_tests(files, recorder)
        fastest = recorder.seconds.get
        found = {line: sorted(ids, key=fastest) for line, ids in recorder.lines.items()}
        return {line: ids + files * (line in recorder.of_fixtures) for line, ids in found.items()}

    found = in_fork(work, 1800)
    return found


def fate(task):
    """Run the tests of a mutant → KILLED or SURVIVED."""
    mutant, tests = task

    def work():
        _, changed = changes(mutant.module)[mutant.number]
        sys.meta_path.insert(0, Planting(mutant.module, changed()))
        return run_tests(tests)

    return SURVIVED if in_fork(work, SECONDS) else KILLED


def run(chosen, say=print):
    """Find the fates of mutants, on all cores → {fate: [mutants]}."""
    import hypothesis.strategies  # noqa: F401  what each fork would load anew
    import PIL.Image  # noqa: F401
    import pytest  # noqa: F401
    import scipy.special  # noqa: F401

    fates = {KILLED: [], SURVIVED: []}
    tests = dict(each(tests_of, list(dict.fromkeys(mutant.module for mutant in chosen))))
    if broken := [module for module, found in tests.items() if found is None]:
        raise SystemExit(f"{', '.join(broken)}: tests fail without a fault")
    tasks = []
    for mutant in chosen:  # a line that no test was seen in may be that of another process
        files = [f"tests/{file}" for file in SUITES[mutant.module]]
        tasks.append((mutant, tests[mutant.module].get(mutant.line, files)))
    for (mutant, _), end in each(fate, tasks):
        fates[end].append(mutant)
        if end != KILLED:
            say(f"{end}: {mutant} {EXPLAINED.get(mutant.key(), '')}".rstrip())
    return fates


def main() -> None:
    """Print what survives, and the rate."""
    count, seed, *modules = [*sys.argv[1:], "400", "0"][: max(2, len(sys.argv) - 1)]
    chosen = [mutant for module in modules or SUITES for mutant in all_mutants(module)]
    total, begun = len(chosen), time.monotonic()
    if int(count):
        chosen = random.Random(int(seed)).sample(chosen, min(int(count), total))
    fates = run(sorted(chosen, key=str))
    explained = [m for m in fates[SURVIVED] if m.key() in EXPLAINED]
    faults = len(chosen) - len(explained)
    print(
        f"{len(chosen)} of {total} mutants in {time.monotonic() - begun:.0f} s: "
        f"{len(fates[KILLED])} killed, {len(fates[SURVIVED])} survived, of which "
        f"{len(explained)} are explained; killed of the others: {len(fates[KILLED]) / faults:.1%}"
    )


if __name__ == "__main__":
    main()
