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
CASES = int(os.environ.get("FUZZ_CASES") or 500)
FIRST = int(os.environ.get("FUZZ_FIRST") or 0)
ALONE = os.environ.get("FUZZ_CASE", "")
SHARES = sum(reader.share for reader in READERS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything that is read, made once by the commands that write it."""
    folder = tmp_path_factory.mktemp("fuzz") / "made"
    make_everything(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_STORE", str(folder / "store"))
        yield folder


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damage_is_found_or_harmless(reader, made):
    """No traceback, no file outside its folder, bounded memory and time."""
    name, _, number = ALONE.partition(":")
    if ALONE and name != reader.name:
        pytest.skip(f"FUZZ_CASE is {ALONE}")
    if reader.needs and not find_spec(reader.needs):
        pytest.skip(f"{reader.needs} is not installed; `make parity` installs it")
    count = max(1, round(CASES * reader.share / SHARES))
    numbers = range(int(number), int(number) + 1) if ALONE else range(FIRST, FIRST + count)
    verdicts = run_cases(reader, numbers, made, made.parent / "case")
    assert len(verdicts) == len(numbers)
    ends = {verdict.code for verdict in verdicts}
    assert len(numbers) < 20 or ends >= {0, 2}, "every case ends alike: nothing is read"
    assert not findings(verdicts), findings(verdicts)
