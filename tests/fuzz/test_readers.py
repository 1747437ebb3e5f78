"""Damaged files of every reader: the right result, or one line that names file and remedy.

`make fuzz N=100000` runs so many cases; the first ones are the same in every run. A finding names
its case, READER:NUMBER, which FUZZ_CASE=READER:NUMBER runs alone.
"""

import os
from importlib.util import find_spec

import pytest

from tests.fuzz.judge import findings, run_cases
from tests.fuzz.readers import READERS, make_everything

pytestmark = pytest.mark.fuzz
CASES = int(os.environ.get("FUZZ_CASES") or 2000)
FIRST = int(os.environ.get("FUZZ_FIRST") or 0)
ALONE = os.environ.get("FUZZ_CASE", "")
SHARES = sum(reader.share for reader in READERS)
A_PART = 100  # cases of one test: readers are as many tests as keep all cores at work


def parts_of(reader):
    """Return the numbers of a reader's cases, a range for each test."""
    count = max(1, round(CASES * reader.share / SHARES))
    ends = range(FIRST, FIRST + count, A_PART)
    return [range(start, min(start + A_PART, FIRST + count)) for start in ends]


PARTS = [(reader, numbers) for reader in READERS for numbers in parts_of(reader)]
if ALONE:
    name, _, number = ALONE.partition(":")
    PARTS = [(r, range(int(number), int(number) + 1)) for r in READERS if r.name == name]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything that is read, made once by the commands that write it."""
    folder = tmp_path_factory.mktemp("fuzz") / "made"
    make_everything(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_STORE", str(folder / "store"))
        patch.setenv("PIP_NO_INDEX", "1")
        yield folder


@pytest.mark.parametrize(("reader", "numbers"), PARTS, ids=lambda it: getattr(it, "name", str(it)))
def test_damage_is_found_or_harmless(reader, numbers, made, record_property):
    """No traceback, no file outside its folder, bounded memory and time, no other result."""
    if reader.needs and not find_spec(reader.needs):
        pytest.skip(f"{reader.needs} is not installed; `make parity` installs it")
    verdicts = run_cases(reader, numbers, made, made.parent / "case")
    record_property("cases", len(verdicts))
    record_property("refused", sum(verdict.code == 2 for verdict in verdicts))
    record_property("findings", sum(verdict.problem is not None for verdict in verdicts))
    assert len(verdicts) == len(numbers)
    ends = {verdict.code for verdict in verdicts}
    assert len(numbers) < 20 or ends >= {0, 2}, "every case ends alike: nothing is read"
    assert not findings(verdicts), findings(verdicts)
