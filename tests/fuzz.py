"""Fuzzing: random edits of every kind of file that is read. `python -m tests.fuzz [MINUTES] [SEED]`

Whatever a file holds, reading it ends in what it says or in an error of one line, within a second
and within three times the file's size and 64 MB of memory. A case that breaks this is printed with
its seed, from which `case(target, seed)` makes it again.
"""

import json
import random
import shutil
import signal
import string
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).parent / "support"))

from small_model import make_pipeline  # noqa: E402

from tinyldm.checkpoints.components import make  # noqa: E402
from tinyldm.checkpoints.safetensors import load_weights  # noqa: E402
from tinyldm.data.folder import load_folder  # noqa: E402
from tinyldm.data.formats import find_arrays, load_arrays  # noqa: E402
from tinyldm.data.tokenizer import Tokenizer  # noqa: E402
from tinyldm.diffusion.samplers import SAMPLERS  # noqa: E402
from tinyldm.diffusion.schedule import Schedule  # noqa: E402
from tinyldm.files import read_json  # noqa: E402
from tinyldm.sampling.metadata import Origin  # noqa: E402

SECONDS, FACTOR, BYTES = 1.0, 3, 64 * 2**20
ODD = [
    None, True, False, 0, 1, -1, 2, 0.5, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "",
    "x", "\0", "\x1b[31m", "\ud800", "__metadata__", "../../etc/passwd", [], {}, [[]], [None], [0],
    [1, 2, 3], ["a"], [[1], [2]], {"a": {}}, "9" * 400, [1] * 1000,
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A kind of file: how one is made in a folder, and what reads it."""

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], object]


def targets(pipe) -> list[Target]:
    """All kinds of files, from a small model."""

    def component(name):
        def write(folder):
            file = folder / "config.json"
            file.write_text(json.dumps(pipe.configs[name]))
            return file

        return Target(f"config of {name}", write, lambda file: make(name, read_json(file)).shapes())

    def scheduler(folder):
        file = folder / "scheduler_config.json"
        file.write_text(json.dumps(pipe.configs["scheduler"]))
        return file

    def read_scheduler(file):
        schedule = Schedule(read_json(file))
        for sampler in ("ddim", "dpm++2m", "euler"):
            list(SAMPLERS[sampler](lambda x, t: 0 * x, schedule, np.zeros((1, 2)), 3))

    def of_tokenizer(name):
        def write(folder):
            pipe.tokenizer.save(folder)
            return folder / name

        return Target(f"tokenizer's {name}", write, lambda f: Tokenizer.load(f.parent)("a red cat"))

    def weights(folder):
        file = folder / "model.safetensors"
        pipe_save(file, {"a.weight": np.ones((2, 3), "f4"), "b": np.ones((3, 3, 2, 2), "f4")})
        return file

    def metadata(name, text):
        def write(folder):
            for image in "ab":
                Image.new("RGB", (4, 4)).save(folder / f"{image}.png")
            (folder / name).write_text(text)
            return folder / name

        return Target(name, write, lambda file: load_folder(file.parent, 4))

    def image(suffix):
        def write(folder):
            file = folder / f"a.{suffix}"
            noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
            Image.fromarray(noise).save(file, **({"exif": b"Exif\0\0"} if suffix == "jpg" else {}))
            return file

        return Target(f"image .{suffix}", write, lambda file: load_folder(file.parent, 4))

    def arrays(name, content):
        def write(folder):
            file = folder / name
            content(file)
            return file

        return Target(name, write, lambda file: load_arrays(find_arrays(file.parent), 4))

    def notes(folder):
        info = PngInfo()
        for key, value in {
            "software": "tinyldm", "prompt": "a", "negative_prompt": "", "picture": "1 of 2",
            "size": "16x16", "weights": "0" * 16, "run": "runs/demo", "steps": "3",
            "guidance": "2.0", "sampler": "ddim", "seed": "7",
        }.items():  # fmt: skip
            info.add_text(key, value)
        Image.new("RGB", (4, 4)).save(folder / "a.png", pnginfo=info)
        return folder / "a.png"

    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (3, 4, 4)) + bytes(range(48))
    images = np.zeros((3, 4, 4), np.uint8)
    return [
        *map(component, ("unet", "vae", "text_encoder")),
        Target("scheduler", scheduler, read_scheduler),
        *map(of_tokenizer, ("vocab.json", "merges.txt", "tokenizer_config.json")),
        Target("weights", weights, load_weights),
        metadata("metadata.jsonl", '{"file_name": "a.png", "text": "A"}\n'),
        metadata("metadata.csv", 'file_name,text\na.png,"A, B"\n'),
        *map(image, ("png", "jpg", "webp", "gif", "bmp")),
        arrays("x-images-idx3-ubyte", lambda file: file.write_bytes(idx)),
        arrays("data_batch_1.bin", lambda file: file.write_bytes(bytes(3073))),
        arrays("a.npz", lambda file: np.savez(file, images=images, labels=np.arange(3))),
        Target("notes of a PNG", notes, Origin.read),
    ]


def pipe_save(file, params):
    from tinyldm.checkpoints.safetensors import save_weights

    save_weights(file, params, {"format": "pt"})


# ------------------------------------------------------------------------------------------- edits


def edited(data: bytes, rng: random.Random) -> bytes:
    """Edit a file at random: as JSON where it is some, else its bytes."""
    if rng.random() < 0.6:
        try:
            return edited_json(data, rng)
        except (ValueError, UnicodeError):
            pass
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 4, 30)))
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:at] + data[at:end] * rng.choice((2, 3, 50)) + data[end:]
        elif kind == 3:
            data = data[:at] + rng.randbytes(end - at) + data[end:]
        elif kind == 4:
            data = data[:at] + rng.choice((b"\xff" * 8, b"\0" * 8, b"\x7f", b"\n", b'"', b"9" * 30))
            data += data[end:]
        elif kind == 5 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 6:
            text = "".join(rng.choices(string.printable, k=rng.randrange(9)))
            data = data[:at] + text.encode() + data[at:]
    return data


def edited_json(data, rng):
    """Change a value, a key, or leave one out; of a file of weights that is in its header."""
    header = data[:1] != b"{"
    start = 8 if header else 0
    stop = 8 + int.from_bytes(data[:8], "little") if header else len(data)
    content = json.loads(data[start:stop])
    for _ in range(rng.choice((1, 1, 2))):
        place, key = content, None
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = rng.choice(list(keys))
            if not isinstance(place[key], (dict, list)) or rng.random() < 0.4:
                break
            place = place[key]
        if not isinstance(place, (dict, list)) or not place:
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[rng.choice(("x", "", *map(str, ODD[:6])))] = place.pop(key)
        else:
            place[key] = rng.choice(ODD)
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        text = text[:-1] + b"," + text[1:]  # every key twice
    return (len(text).to_bytes(8, "little") if header else b"") + text + data[stop:]


# ------------------------------------------------------------------------------------------- cases


def case(target: Target, seed: int, folder: Path) -> str:
    """Try one edit → "" where it is read or refused as it should be, else what went wrong."""
    rng = random.Random(f"{target.name} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = target.write(folder)
    file.write_bytes(edited(file.read_bytes(), rng))
    size = file.stat().st_size
    tracemalloc.start()
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)  # tracing takes several times as long
    try:
        target.read(file)
    except (ValueError, OSError) as error:
        lines = str(error).splitlines()
        if not all(line.isprintable() for line in lines) or len(lines) > 7:
            return f"a message that cannot be shown: {error!r}"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    if most > FACTOR * size + BYTES:
        return f"{most:,} bytes of memory for a file of {size:,}"
    return ""


class TooLong(Exception):
    """A file took more than its time."""


def _too_long(*_):
    raise TooLong(f"more than {SECONDS} s")


def main() -> int:
    """Fuzz for some minutes; → the number of cases that went wrong."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    began, failed, tried = time.monotonic(), 0, 0
    kinds = targets(make_pipeline())
    with tempfile.TemporaryDirectory() as place:
        while time.monotonic() - began < 60 * minutes:
            for target in kinds:
                problem = case(target, seed, Path(place) / "case")
                tried += 1
                if problem:
                    failed += 1
                    print(f"{target.name}, seed {seed}: {problem}", flush=True)
            seed += 1
    print(f"{tried} cases of {len(kinds)} kinds up to seed {seed - 1}, {failed} went wrong")
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
