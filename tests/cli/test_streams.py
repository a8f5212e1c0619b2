"""Any terminal, any stream: the work is done, and the exit code is as ever."""

import contextlib
import os
import subprocess
import sys

import pytest
from slow import mostly_slow
from small_model import make_pipeline

from tinyldm import cli

COMMAND = [sys.executable, "-m", "tinyldm", "sample"]
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "model"
    make_pipeline().save(folder)
    return folder


def run(model, output, shell="", prompt=PROMPT, **environment):
    """Generate an image in a shell, with what is done to its streams → (exit code, stdout, err)."""
    words = [*COMMAND, os.fspath(model), prompt, "-o", os.fspath(output), "--steps", "2"]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {shell}', "bash", *words],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()} | environment,
    )
    return done.returncode, done.stdout, done.stderr


SHELLS = [
    ">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full",
    ">/dev/full 2>/dev/full", "> >(true)", "2> >(true)", "> >(exec >&-; sleep 0) 2>&1",
]  # fmt: skip


@pytest.mark.parametrize("shell", mostly_slow(SHELLS, ">&- 2>&-", "2>/dev/full", "> >(true)"))
def test_without_a_reader_the_work_is_done(model, tmp_path, shell):
    code, out, err = run(model, tmp_path / "a.png", shell)
    lost = ">/dev/full" in shell.split()  # the results, for want of space
    assert code == lost and (tmp_path / "a.png").stat().st_size > 100
    assert b"Traceback" not in err and b"Exception ignored" not in err
    assert out in (b"", f"{tmp_path / 'a.png'}\n".encode())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sample", "--help"]])
def test_help_that_cannot_be_written_is_a_failure(words):
    command = ["bash", "-c", '"$@" > /dev/full', "bash", *COMMAND[:3], *words]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("locale", mostly_slow(["C", "C.UTF-8", "POSIX"], "C"))
def test_a_prompt_is_utf_8_in_any_locale(model, tmp_path, locale):
    names = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert run(model, tmp_path / "a.png", prompt="été", **names)[0] == 0
    assert run(model, tmp_path / "b.png", prompt="été")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    code, _, err = run(model, tmp_path / "c.png", prompt=b"\xe9t\xe9", **names)
    assert code == 2 and b"prompt: not valid UTF-8" in err


@pytest.mark.parametrize("shell", mostly_slow(SHELLS, "2>&-"))
def test_without_a_reader_a_mistake_is_one(model, tmp_path, shell):
    code, *_ = run(tmp_path / "none", tmp_path / "a.png", shell)
    assert code == 2


@pytest.mark.parametrize("encoding", mostly_slow(["ascii", "latin-1", "utf-8", "cp1252"], "ascii"))
def test_names_and_words_that_the_terminal_lacks(model, tmp_path, encoding):
    names = {"PYTHONIOENCODING": encoding}
    file = tmp_path / "küche \u2026 \u732b.png"
    code, out, err = run(model, file, prompt="ein Kätzchen \u732b", **names)
    assert code == 0 and file.exists() and b"Traceback" not in err
    expected = str(file).encode(encoding, "backslashreplace")
    assert out == expected + b"\n"
    help = subprocess.run([*COMMAND, "--help"], capture_output=True, env=os.environ | names)
    assert help.returncode == 0 and b"reproduce" in help.stdout
    code, _, err = run(tmp_path / "\u732b", file, **names)
    assert code == 2 and b"\n" not in err.strip() and b"no such file or folder" in err


@pytest.mark.parametrize("locale", mostly_slow(["C", "C.UTF-8", "POSIX"], "C"))
@pytest.mark.parametrize("name", [b"caf\xe9", "caf\u00e9".encode(), b"\x1b[31mred", b"a\nb"])
def test_a_files_name_is_any_bytes(model, tmp_path, locale, name):
    file = tmp_path / os.fsdecode(name + b".png")
    names = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, err = run(model, file, **names)
    assert code == 0 and file.exists()
    assert out == os.fsencode(file) + b"\n"  # as a script needs it
    code, _, err = run(os.fsencode(tmp_path) + b"/" + name, file, **names)
    assert code == 2 and b"no such file or folder" in err
    assert len(err.strip().splitlines()) == 1 and b"\x1b" not in err


@pytest.mark.parametrize(
    "words, says",
    [
        (["--negative", "-dark"], "--negative=-5"),
        (["--seed", "-"], "--seed: expected an integer ≥ 0, found '-'"),
        (["--seed", "-1"], "--seed: expected an integer ≥ 0, found '-1'"),
        (["--seed=-1"], "--seed: expected an integer ≥ 0, found '-1'"),
        (["--guidance", "1e400"], "--guidance: expected a number -1000…1000, found '1e400'"),
        (["--size", "-16"], "size: expected multiples of"),
        (["--size", "16x"], "--size: expected S or HEIGHTxWIDTH, found '16x'"),
        (["--steps", "99999999999999999999"], "steps: expected 1…1000, found 99999999999999999999"),
        (["--steps", "9" * 5000], f"--steps: expected an integer ≥ 1, found '{'9' * 59}…"),
        (["--size", "9" * 5000], f"--size: expected S or HEIGHTxWIDTH, found '{'9' * 59}…"),
        (["--" + "a" * 5000], f"unknown option '--{'a' * 57}…"),
        (["--guidance", "1e30"], "--guidance: expected a number -1000…1000, found '1e30'"),
        (["-"], "unknown option '-'"),
        (["--", "--steps", "2"], "unexpected --steps behind --; options go before it"),
        (["--", "-x"], "unknown option '-x'"),
    ],
)
def test_values_that_begin_with_a_dash(model, tmp_path, words, says, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused_by_parser = pytest.raises(SystemExit) if says[0] in "-u" else contextlib.nullcontext()
    with refused_by_parser:
        assert cli.main(["sample", str(model), PROMPT, *words]) == 2
    out, err = capsys.readouterr()
    assert says in err and out == "" and len(err.splitlines()) == 1


@pytest.mark.parametrize("prompt", ["-a red circle", "-", "-5", "--steps"])
def test_a_prompt_that_begins_with_a_dash(model, tmp_path, prompt, capsys, monkeypatch):
    monkeypatch.chdir(model.parent)
    file = tmp_path / "a.png"
    assert cli.main(["sample", "-o", str(file), "--steps", "1", "--", str(model), prompt]) == 0
    between = ["sample", str(model), "-o", str(file), "--steps", "1", "--negative=-b", "--", prompt]
    assert cli.main(between) == 0
    assert cli.main(["sample", "--reproduce", str(file)]) == 0
