"""Some cases of every kind of file of `python -m tests.fuzz`, which goes on as long as asked."""

import pytest
from slow import mostly_slow
from small_model import make_pipeline

from tests.fuzz import case, targets

TARGETS = {target.name: target for target in targets(make_pipeline())}
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged files


@pytest.mark.parametrize("seeds", mostly_slow([range(20), range(20, 1000)], range(20)))
@pytest.mark.parametrize("name", TARGETS)
def test_edited_files_are_read_or_refused(name, seeds, tmp_path):
    problems = {seed: case(TARGETS[name], seed, tmp_path / "case") for seed in seeds}
    assert not {seed: problem for seed, problem in problems.items() if problem}


@pytest.mark.parametrize("name", TARGETS)
def test_every_beginning_of_a_file_is_read_or_refused(name, tmp_path, monkeypatch):
    """Cut a file off anywhere, as a full disk or a broken download does: it is read or refused."""
    target = TARGETS[name]
    whole = target.write(tmp_path).read_bytes()
    step = max(1, len(whole) // 40)
    for end in range(0, len(whole), step):
        monkeypatch.setattr("tests.fuzz.edited", lambda data, rng, end=end: data[:end])
        assert not case(target, 0, tmp_path / "case"), end
