"""The checker on right and on faulty backward passes of many kinds: none missed, none refused."""

import pytest
from corpus import CASES, inputs_of, measure, with_fault
from hypothesis import given, settings
from slow import EXAMPLES
from strategies import seeds

from tinyldm.testing import GradientError, check_gradients


def test_most_causes_are_named():
    rows = measure()
    faulty = [row for row in rows if row.fault]
    assert len(faulty) >= 60 and len(rows) - len(faulty) >= 60
    assert sum(row.named for row in faulty) >= 0.8 * len(faulty)


# More than 2,000 calls in the profile of CI, 100,000 in the nightly one.
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=EXAMPLES * 6 // 5 if EXAMPLES < 500 else 1450)
@given(seed=seeds)
def test_a_right_function_is_not_refused(name, seed):
    check_gradients(CASES[name].f, inputs_of(CASES[name], seed), rng=seed)


FAULTS = [(name, what) for name, case in CASES.items() for what in case.faults]


@pytest.mark.parametrize("name, what", FAULTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_fault_is_found(name, what, seed):
    with pytest.raises(GradientError):
        check_gradients(with_fault(CASES[name], what), inputs_of(CASES[name], seed), rng=seed + 100)
