"""One image by Stable Diffusion 1.5 at full size, from a folder on disk, beside diffusers."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.compare import Rows, Run, check, milliseconds, ratio_columns, relative
from bench.measure import Elsewhere, Step, interleaved
from bench.nets import random_params
from tinyldm.checkpoints.components import COMPONENTS
from tinyldm.checkpoints.diffusers_folder import save_folder
from tinyldm.checkpoints.single_file import VERSIONS
from tinyldm.models import Tokenizer
from tinyldm.sampling.pipeline import Pipeline

STEPS, GUIDANCE, PROMPT = 20, 7.5, "a photograph of an astronaut riding a horse"
SMALL = {  # for --tiny
    "unet": {"block_out_channels": [32, 64, 64, 64], "sample_size": 8, "cross_attention_dim": 32},
    "vae": {"block_out_channels": [32, 32, 32, 32]},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    },
    "scheduler": {},
}
POLL = 0.2  # seconds
THEIRS = """
import sys, numpy, torch
from diffusers import StableDiffusionPipeline
folder, prompt, steps, guidance = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
with torch.inference_mode():
    pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(guidance))
"""


def write_model(folder: Path, tiny: bool) -> None:
    """The folder of a Stable Diffusion 1.5 with random weights; `tiny`: of its make, but small."""
    configs, pad = VERSIONS[768]
    configs = {name: config | (SMALL[name] if tiny else {}) for name, config in configs.items()}
    params = {
        name: random_params(model(configs[name]).shapes())
        for name, (_, model, _) in COMPONENTS.items()
    }
    scheduler = "DDIMScheduler"
    configs["scheduler"] |= {"_class_name": scheduler}
    save_folder(folder, configs, params, Tokenizer.clip(pad), {}, scheduler)


def our_step(folder: Path) -> Step:
    """→ latents after one more of the 20 steps, which begin again after the last."""
    pipe = Pipeline.load(folder)
    recipe = pipe.sampling_params(PROMPT, steps=STEPS, guidance=GUIDANCE)
    noise = _noise(pipe.size, pipe.vae.factor)
    return _endless(lambda: (x for x, _ in pipe.denoise(recipe, noise)))


def their_step(folder: Path) -> Step:
    """The same with diffusers; as an array, in PyTorch's order of axes."""
    import torch

    from bench import peer

    pipe = peer.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    factor = pipe.vae_scale_factor
    noise = _noise([pipe.unet.config.sample_size * factor] * 2, factor)
    noise = peer.tensor(noise, "contiguous")

    def latents():
        with torch.inference_mode():
            with_text, without = pipe.encode_prompt(PROMPT, "cpu", 1, True)
            both = torch.cat([without, with_text])
            pipe.scheduler.set_timesteps(STEPS)
            x = noise
            for t in pipe.scheduler.timesteps:
                y = pipe.unet(torch.cat([x, x]), t, both).sample
                without, with_text = y.chunk(2)
                y = without + GUIDANCE * (with_text - without)
                x = pipe.scheduler.step(y, t, x).prev_sample
                yield x.numpy()

    return _endless(latents)


def _noise(size, factor):
    h, w = (side // factor for side in size)
    return np.random.default_rng(1).standard_normal((1, h, w, 4), np.float32)


def _endless(begin: Callable) -> Step:
    def forever():
        while True:
            yield from begin()

    return forever().__next__


def run_measured(command: list[str]) -> tuple[float, int]:
    """Seconds that a command takes, and the most bytes that it and its processes held at once."""
    start, most = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        most = max(most, _held(process.pid))
        time.sleep(POLL)
    if process.returncode:
        raise SystemExit(process.stderr.read().decode())
    return time.perf_counter() - start, most


def _held(pid):
    """Proportional: memory that processes share counts once."""
    folder = Path("/proc") / str(pid)
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()
        children = (folder / "task" / str(pid) / "children").read_text().split()
    except OSError:  # it has ended, or there is no /proc
        return 0
    own = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return own + sum(map(_held, children))


def table(run: Run) -> Rows:
    """One image by Stable Diffusion 1.5

    512×512, 20 steps of DDIM with guidance, random weights in a folder on disk. First the steps, in
    turn with those of diffusers (contiguous, its faster format here); then the whole command, a
    process of its own from loading to the PNG: seconds, and the most memory that it held.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, run.tiny)
        yield _steps(folder, run)
        yield _whole(folder, run)


def _steps(folder, run):
    preload = "bench.peer" if run.peer else "bench.measure"
    prepared = [our_step, *([their_step] if run.peer else [])]
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(Elsewhere(one, folder, preload=preload)) for one in prepared]
        columns = {}
        if run.peer:
            ours, theirs = (side() for side in sides)
            difference = relative(ours, theirs.transpose(0, 2, 3, 1))
            check("a step", difference)
            columns["difference"] = f"{difference:.0e}"
        times = interleaved(sides, run.rounds if run.tiny else STEPS)
    row = {"case": "step with guidance", "tinyldm ms": milliseconds(times[0])}
    if run.peer:
        row["PyTorch ms"] = milliseconds(times[1])
        row |= ratio_columns(times[0], {"contiguous": times[1]})[0]
    return row | columns | {"MB": "–"} | ({"MB, PyTorch": "–"} if run.peer else {})


def _whole(folder, run):
    numbers = ["--steps", str(STEPS), "--guidance", str(GUIDANCE), "-o", f"{folder}.png"]
    command = [sys.executable, "-m", "tinyldm", "sample", str(folder), PROMPT, *numbers]
    seconds, held = run_measured(command)
    row = {"case": f"image, {STEPS} steps", "tinyldm ms": f"{1e3 * seconds:.0f}"}
    row["MB"] = f"{held / 1e6:.0f}"
    if run.peer:
        command = [sys.executable, "-c", THEIRS, str(folder), PROMPT, str(STEPS), str(GUIDANCE)]
        their_seconds, their_held = run_measured(command)
        row["PyTorch ms"] = f"{1e3 * their_seconds:.0f}"
        row["ratio"] = f"{their_seconds / seconds:.2f}"
        row["MB, PyTorch"] = f"{their_held / 1e6:.0f}"
    return row
