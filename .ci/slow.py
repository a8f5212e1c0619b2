"""Runs the slow profile as far as half an hour reaches.

The tests marked slow and the suite with plain functions alone come first, every day. Then the files
with 500 examples of each property, from another file every day. A part that fails fails the run,
and what was not reached is printed.
"""

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 1800.0


def parts():
    """[(what it is, environment, arguments of pytest)]"""
    ci = {"TINYLDM_HYPOTHESIS_PROFILE": "ci"}
    always = [
        ("the tests marked slow", ci, ["-m", "slow", "tests"]),
        ("the suite with plain functions alone", ci | {"TINYLDM_KERNELS": "plain"}, ["tests"]),
    ]
    nightly = {"TINYLDM_HYPOTHESIS_PROFILE": "nightly"}
    files = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/**/test_*.py"))
    files = [file for file in files if not file.startswith(("tests/parity", "tests/browser"))]
    first = datetime.date.today().toordinal() * 7 % len(files)
    files = files[first:] + files[:first]
    return always + [(f"{file}, 500 examples", nightly, [file]) for file in files]


def main():
    end = time.monotonic() + SECONDS
    todo, failed, missed = parts(), [], []
    for what, environment, arguments in todo:
        left = end - time.monotonic()
        if left < 5:
            missed.append(what)
            continue
        print(f"+ {what}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, timeout=left, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            missed.append(f"{what} (begun)")
            continue
        print(done.stdout[-4000:] if done.returncode else done.stdout.splitlines()[-1], flush=True)
        if done.returncode not in (0, 5):  # 5: no test was selected
            failed.append(what)
    if missed:
        print(f"not reached in {SECONDS / 60:g} minutes: {len(missed)} of {len(todo)} parts:")
        print("\n".join(f"  {what}" for what in missed))
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
