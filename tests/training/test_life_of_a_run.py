"""A run through anything: trained, stopped, killed, damaged, resumed, in any order."""

import contextlib
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from slow import seldom
from small_run import CONFIG, STEPS, at_step, silent, without_images

from tinyldm.checkpoints.diffusers_folder import CHECKSUMS, is_whole
from tinyldm.checkpoints.safetensors import WeightsError
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training import loop
from tinyldm.training.run import resume, train, whole_run
from tinyldm.training.signals import Stopped
from tinyldm.training.state import load_notes, state_files

PROMPT = "a large red circle on blue at the left"


class Crash(BaseException):
    """Exception of a test that ends a run at once, as a kill does."""


class Life(RuleBasedStateMachine):
    """The folder of one run. At its end it is as if nothing had happened to it."""

    undisturbed = None  # the bytes of the last state and of all exports, and an image

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        without_images(self.patch)
        self.patch.setattr(loop, "SAVE_EVERY", -1)
        self.place = Path(tempfile.mkdtemp())
        if Life.undisturbed is None:
            train(self.place / "whole", CONFIG, say=silent)
            Life.undisturbed = self.results(self.place / "whole")
        self.run = self.place / "run"

    def results(self, run):
        files = [f for f in run.rglob("*") if f.suffix in (".safetensors", ".json", ".txt")]
        files = [f for f in files if "training" not in f.parts] + state_files(run)[-1:]
        image = Pipeline.load(run)(PROMPT, seed=3)[0]
        return {f.relative_to(run): f.read_bytes() for f in files}, np.asarray(image).tobytes()

    def go_on(self, **options):
        if state_files(self.run):
            resume(self.run, say=silent, **options)
        else:
            train(self.run, CONFIG, say=silent)

    @initialize()
    def begin(self):
        pass

    @rule(step=st.integers(1, 2 * STEPS), kill=st.booleans())
    def is_stopped(self, step, kill):
        def stop():
            if kill:
                raise Crash
            signal.raise_signal(signal.SIGINT)

        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, step, stop)
            with contextlib.suppress(Stopped, Crash):
                self.go_on()

    @rule(keep=st.integers(1, 3))
    def goes_on(self, keep):
        self.go_on(**({"keep": keep} if state_files(self.run) else {}))

    @precondition(lambda self: len(state_files(self.run)) > 1)
    @rule(share=st.floats(0, 1, exclude_max=True), cut=st.booleans())
    def newest_state_is_damaged(self, share, cut):
        *_, file = state_files(self.run)
        data = bytearray(file.read_bytes())
        if not data:  # it has been cut off before, at the start
            return
        at = int(share * len(data))
        data[at] ^= 1
        file.write_bytes(data[:at] if cut else data)

    @precondition(lambda self: is_whole(self.run))
    @rule(name=st.sampled_from(["unet", "vae"]), share=st.floats(0, 1, exclude_max=True))
    def an_export_is_damaged(self, name, share):
        file = self.run / name / "diffusion_pytorch_model.safetensors"
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start + int(share * (len(data) - start))] ^= 16
        file.write_bytes(data)
        with pytest.raises(WeightsError):
            Pipeline.load(self.run)
        (self.run / CHECKSUMS).write_text('{"format": "tinyldm 2"}')  # as the user is told

    @precondition(lambda self: state_files(self.run))
    @rule()
    def is_sampled_from(self):
        with contextlib.suppress(WeightsError, FileNotFoundError):
            whole_run(str(self.run), silent)
            assert len(Pipeline.load(self.run)(PROMPT, steps=1)) == 1

    def teardown(self):
        for _ in range(3):  # the options of a run may have been those of one that had ended
            self.go_on()
        assert load_notes(self.run)["config"].keep in (1, 2, 3)
        found, image = self.results(self.run)
        expected, expected_image = Life.undisturbed
        assert image == expected_image
        for file, data in expected.items():
            if not file.name.startswith("state-"):
                assert found[file] == data, file
        self.patch.undo()
        shutil.rmtree(self.place)


TestLife = Life.TestCase
TestLife.settings = settings(
    seldom, stateful_step_count=6, deadline=None, max_examples=min(seldom.max_examples, 60)
)
