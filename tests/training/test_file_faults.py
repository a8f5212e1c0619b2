"""Death and errors at every file operation of a run: nothing is lost, nothing is half-written.

A copy of this process works, with a hook that Python calls before each operation on a file (PEP
578). At the n-th in the run's folder it dies, without any clean-up, or the operation fails.
"""

import errno
import os
import resource
import shutil
import signal
import sys

import pytest
from slow import mostly_slow
from small_run import CONFIG, STEPS, silent, without_images

from tinyldm import cli, threads
from tinyldm.sampling.pipeline import Pipeline
from tinyldm.training import loop, presets
from tinyldm.training.run import rebuild, resume, train, whole_run
from tinyldm.training.state import load_notes, state_files

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
DIED, FINISHED = 9, 0


@pytest.fixture(autouse=True)
def no_images(monkeypatch):
    without_images(monkeypatch)
    monkeypatch.setattr(loop, "SAVE_EVERY", -1)  # after every step
    monkeypatch.setitem(presets.PRESETS, "tiny", CONFIG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    without_images(patch)
    run = tmp_path_factory.mktemp("faults") / "run"
    train(run, CONFIG, say=silent)
    patch.undo()
    return run


def in_a_copy(work, folder, number, strike, messages=None):
    """Do `work` in a copy of this process, and `strike` at the n-th operation → exit code."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        threads._pool.cache_clear()  # its threads were not copied
        if messages:
            sys.stderr = open(messages, "w")
        inside, seen = os.fspath(folder), [0]

        def hook(event, arguments):
            if event in OPERATIONS and os.fspath(str(arguments[0])).startswith(inside):
                seen[0] += 1
                if seen[0] == number:
                    strike()

        sys.addaudithook(hook)
        os._exit(work() or FINISHED)
    except BaseException:
        os._exit(77)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def assert_equal(run, whole):
    """All that was exported, and the last state, have the bytes of a run that nothing disturbed."""
    files = [f for f in whole.rglob("*") if f.is_file() and f.suffix in (".safetensors", ".json")]
    files = [f.relative_to(whole) for f in files if not f.name.startswith("state-")]
    files.append(state_files(whole)[-1].relative_to(whole))
    for file in files:
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


def assert_no_leftovers(run):
    assert not [f for f in run.rglob(".*") if f.is_file()]


EXPORT = range(1, 202)  # operations of an export, and more: then it ends by itself


@pytest.mark.parametrize("numbers", mostly_slow([EXPORT[::40], EXPORT], EXPORT[::40]))
def test_death_in_an_export(whole, tmp_path, numbers):
    for number in numbers:
        run = shutil.copytree(whole, tmp_path / str(number))
        code = in_a_copy(lambda run=run: rebuild(run) and 0, run, number, die)
        assert code in (-signal.SIGKILL, FINISHED)
        whole_run(str(run), silent)
        Pipeline.load(run)
        resume(run, say=silent)
        assert_equal(run, whole)
        assert_no_leftovers(run)
    assert code == FINISHED, "there are more operations than were tried"


RUN = range(1, 400)


@pytest.mark.parametrize("numbers", mostly_slow([RUN[20::80], RUN[::7]], RUN[20::80]))
@pytest.mark.parametrize("strike", [die, fail])
def test_death_and_errors_in_a_run(whole, tmp_path, numbers, strike):
    for number in numbers:
        run, messages = tmp_path / str(number), tmp_path / f"{number}.txt"
        words = ["train", "--preset", "tiny", "--out", str(run)]
        code = in_a_copy(lambda words=words: cli.main(words), run, number, strike, messages)
        said = messages.read_text()
        assert "Traceback" not in said and code in (-signal.SIGKILL, 0, 1, 2), said
        if strike is fail and code:
            assert "tinyldm: [Errno 5]" in said, (number, code, said)
        if state_files(run):
            resume(run, say=silent)
        else:
            train(run, CONFIG, say=silent)
        assert_equal(run, whole)
        assert_no_leftovers(run)


@pytest.mark.parametrize("size", mostly_slow([0, 100, 3000, 10_000, 30_000, 60_000, 100_000], 3000))
def test_no_file_can_be_longer_than(whole, tmp_path, size):
    """Limit the size of files, as a full disk does: training says so and loses nothing."""
    run, messages = shutil.copytree(whole, tmp_path / "run"), tmp_path / "said.txt"
    state_files(run)[-1].unlink()
    before = load_notes(run)["step"]

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return cli.main(["train", "--out", str(run), "--resume"])

    code = in_a_copy(work, run, None, None, messages)
    assert code in (0, 1)
    if code:
        assert load_notes(run)["step"] >= before
    resume(run, say=silent)
    assert_equal(run, whole)
    assert_no_leftovers(run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_killed_at_any_moment(whole, tmp_path, seed):
    """SIGKILL after a random time, again and again, until the run is done.

    On a fast machine a run may end before its first kill: it begins anew, with half the time.
    """
    run, kills, longest = tmp_path / "run", 0, 0.4
    while True:
        seconds = 0.02 + longest * ((seed * 997 + kills * 131) % 1000) / 1000
        begun = state_files(run)
        words = ["train", "--out", str(run), *(["--resume"] if begun else ["--preset", "tiny"])]

        def work(words=words, seconds=seconds):
            signal.signal(signal.SIGALRM, lambda *_: die())
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return cli.main(words)

        code = in_a_copy(work, run, None, None, tmp_path / "said.txt")
        if code == FINISHED and not kills:
            shutil.rmtree(run)
            longest /= 2
            continue
        if code == FINISHED:
            break
        assert code == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
        kills += 1
        if kills == 25:
            resume(run, say=silent) if state_files(run) else train(run, CONFIG, say=silent)
            break
    assert load_notes(run)["done_before"] == STEPS
    assert_equal(run, whole)
