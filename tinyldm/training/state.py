"""The state of a run: one file, written whole or not at all, all that `resume` reads.

`training/state-<step>.safetensors` holds every array that training changes, and as notes in its
header the run's config and how far it is. Random numbers need no state: those of a step are drawn
from (seed, stage, step). The component folders beside it are exports, which can be recreated.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyldm.backend import to_device
from tinyldm.checkpoints.components import COMPONENTS, make
from tinyldm.checkpoints.diffusers_folder import naming
from tinyldm.checkpoints.safetensors import (
    Damaged,
    WeightsError,
    load_metadata,
    load_weights,
    match,
    save_weights,
)
from tinyldm.config import Kind, brief, check_kind, unknown
from tinyldm.kernels.cpu.flat import Flat
from tinyldm.lock import touch
from tinyldm.models import ClassNames, Tokenizer
from tinyldm.nn.optim import adam_state, is_inner
from tinyldm.training.config import STAGES, Config, discriminator_of

VERSION = 1  # of the contents of a file
NOTES: dict[str, Kind] = {  # of State, in the header → kind of its value
    "stage": str, "data": str, "step": int, "total": int | None, "seconds": float,
    "corrections": int, "done_before": int, "scaling_factor": float,
}  # fmt: skip
ALL_NOTES = NOTES | {"version": int, "config": dict, "tokenizer": dict}
GROUPS = ("params", "m", "v", "average", "first_stage")  # of the arrays in a file
GROUPS += ("discriminator", "discriminator_m", "discriminator_v")  # where there is one


@dataclass
class State:
    """State of a run. `params` are what the present stage trains; `first_stage` is finished.

    `discriminator` is trained beside them, where stage 1 has one.
    """

    config: Config
    stage: str
    params: dict
    tokenizer: Tokenizer | ClassNames
    data: str  # fingerprint of the images and captions
    moments: dict = None  # of Adam
    average: dict = None  # moving average of params
    first_stage: dict = field(default_factory=dict)
    discriminator: dict = field(default_factory=dict)
    discriminator_moments: dict = field(default_factory=dict)
    step: int = 0  # done in this stage
    total: int | None = None  # steps of this stage, once it is known
    seconds: float = 0.0  # that this stage has taken so far, where its length is given in them
    corrections: int = 0  # of their number, so far
    done_before: int = 0  # steps of the stages before
    scaling_factor: float = 1.0

    def __post_init__(self):
        inner = [name for name, w in self.params.items() if is_inner(name, w)]
        self.params = Flat(self.params, shared=True, first=inner)
        self.average = Flat(self.average or self.params, first=inner)
        self.moments = _moments(self.params, self.moments)
        if self.discriminator:
            self.discriminator = Flat(self.discriminator, shared=True)
            self.discriminator_moments = _moments(self.discriminator, self.discriminator_moments)
        else:
            self.discriminator_moments = {}

    @property
    def finished(self) -> bool:
        """Return whether the last stage has made all its steps."""
        return self.stage == STAGES[-1] and self.step == self.total


def _moments(params, found):
    """Return the moments that were found, or those of the start."""
    if not found:
        found = adam_state(params)
    return {moment: Flat(named, first=params.first) for moment, named in found.items()}


def save_state(run: str | Path, state: State) -> Path:
    """Write the newest state and remove all but the last `config.keep`."""
    folder = Path(run) / "training"
    groups = {
        "params": state.params,
        "m": state.moments["m"],
        "v": state.moments["v"],
        "average": state.average,
        "first_stage": state.first_stage,
        "discriminator": state.discriminator,
    }
    groups |= {f"discriminator_{m}": named for m, named in state.discriminator_moments.items()}
    arrays = {
        f"{group}/{name}": to_device(array, "cpu")
        for group, named in groups.items()
        for name, array in named.items()
    }
    notes = {name: getattr(state, name) for name in NOTES}
    notes["version"] = VERSION
    notes["config"] = dataclasses.asdict(state.config)
    notes["tokenizer"] = state.tokenizer.content
    file = folder / f"state-{state.done_before + state.step:08d}.safetensors"
    save_weights(file, arrays, {"tinyldm": json.dumps(notes)})
    touch(run)
    for old in state_files(run)[: -state.config.keep]:
        old.unlink()
    return file


def state_files(run: str | Path) -> list[Path]:
    """List the state files of a run, oldest first."""
    return sorted((Path(run) / "training").glob("state-*.safetensors"))


def load_notes(run: str | Path) -> dict:
    """Read the notes of a run's newest state: its config, its stage, how far it is."""
    *_, file = state_files(run) or [None]
    if file is None:
        raise FileNotFoundError(f"{run}: holds no run (no training/state-*.safetensors)")
    try:
        notes = json.loads(load_metadata(file)["tinyldm"])
        check_kind("its notes", "content", notes, dict)
        notes.setdefault("version", 0)
        for name, kind in ALL_NOTES.items():
            least = int(name == "scaling_factor")
            check_kind("its notes", name, notes[name], kind, least, most=10**12)
        if notes.pop("version") > VERSION:
            raise WeightsError(f"{file}: written by a newer version of tinyldm; take that one")
        if others := notes.keys() - ALL_NOTES.keys():
            raise ValueError(f"its notes: unknown key {brief(min(others))}")
        if notes["stage"] not in STAGES:
            raise ValueError(f"its notes: stage: {unknown(notes['stage'], STAGES)}")
        if notes["total"] is not None and notes["step"] > notes["total"]:
            raise ValueError(f"its notes: step {notes['step']} of {notes['total']}")
        if int(file.stem.removeprefix("state-")) != notes["done_before"] + notes["step"]:
            raise ValueError(f"its notes: its name says another step than {notes['step']}")
        notes["config"] = Config.from_json(notes["config"])
        notes["tokenizer"] = _tokenizer_of(notes["tokenizer"])
        return notes
    except WeightsError:
        raise
    except KeyError as error:
        raise WeightsError(
            f"{file}: not a state of tinyldm, or of another version: no {error}"
        ) from None
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: a state of another version, or changed: {error}") from None


def _tokenizer_of(content):
    """Rebuild a tokenizer from its `content`, as JSON."""
    try:
        if "names" in content:
            return ClassNames(**content)
        merges = [tuple(pair) for pair in content["merges"]]
        return Tokenizer(**(content | {"merges": merges}))
    except (TypeError, AttributeError):
        raise ValueError(
            f"its notes: tokenizer: expected vocab, merges and max_length, or names, found "
            f"{brief(content)}"
        ) from None


def load_state(
    run: str | Path, device: str = "cpu", say: Callable[[str], None] | None = None
) -> State:
    """Load the newest state of a run. FileNotFoundError if it has none, WeightsError if damaged.

    say: takes a line. With it, a newest state that is damaged is put aside, and the one before is
    loaded.
    """
    try:
        notes = load_notes(run)
        *_, file = state_files(run)
        arrays = load_weights(file)
        with naming(file):
            shapes = _shapes(notes)
        match({path: x.shape for path, x in arrays.items()}, shapes, file)
        for path, x in arrays.items():
            if x.dtype != np.float32:
                raise WeightsError(f"{file}: {path}: expected float32, found {x.dtype}")
    except Damaged as error:
        *before, file = state_files(run)
        if not before:
            raise Damaged(f"{error}; there is no state before it") from None
        if say is None:
            raise Damaged(f"{error}; {before[-1].name} is the one before it") from None
        say(f"{error}; going on from {before[-1].name} before it")
        aside = file.rename(file.with_name(f"{file.name}.damaged"))
        try:
            return load_state(run, device, say)
        except ValueError:  # nor can that one be: all stays where it was
            aside.rename(file)
            raise
    groups = {name: {} for name in GROUPS}
    for path, array in arrays.items():
        group, _, name = path.partition("/")
        groups[group][name] = to_device(array, device)
    return State(
        params=groups["params"],
        moments={"m": groups["m"], "v": groups["v"]},
        average=groups["average"],
        first_stage=groups["first_stage"],
        discriminator=groups["discriminator"],
        discriminator_moments={m: groups[f"discriminator_{m}"] for m in ("m", "v")},
        **notes,
    )


def _shapes(notes):
    """Return {group/name: shape} of the arrays of a state with these notes."""
    config = notes["config"]
    configs = config.configs(notes["tokenizer"])
    shapes = {name: make(name, configs[name]).shapes() for name in COMPONENTS if name in configs}
    vae = shapes.pop("vae")
    if notes["stage"] == STAGES[0]:
        of_group = dict.fromkeys(("params", "m", "v", "average"), vae)
        if config.adversarial:
            names = ("discriminator", "discriminator_m", "discriminator_v")
            of_group |= dict.fromkeys(names, discriminator_of(config).shapes())
    else:
        trained = {name: shape for of in shapes.values() for name, shape in of.items()}
        of_group = dict.fromkeys(("params", "m", "v", "average"), trained) | {"first_stage": vae}
    return {f"{g}/{name}": shape for g, of in of_group.items() for name, shape in of.items()}
