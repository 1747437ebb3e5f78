"""What the process holds, and how its memory is given out."""

import os
import platform
import subprocess
import sys

import pytest

from qat.runtime.memory import HUGE_PAGES, host_bytes, peak_rss_bytes

COUNT_FAULTS = """
import resource
from qat.runtime.memory import tune_allocation
if {tunes}:
    tune_allocation()
block = bytearray(b"x") * 64_000_000
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray(b"x") * 64_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

HELD_AFTER = """
import resource
from pathlib import Path
from qat.runtime.memory import return_freed, tune_allocation
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
tune_allocation()
block = bytearray(b"x") * 64_000_000
above = bytearray(b"x") * 1_000_000  # stays: what is below is a hole
full = held()
del block
kept = held()
return_freed()
print(full - kept, full - held())
"""

# Torch looks at its first allocation: a fork each after one import.
FIRST_TENSORS = """
import os, resource
import torch
from qat.runtime.memory import tune_allocation
for tunes in (False, True):
    if os.fork():
        os.wait()
        continue
    if tunes:
        tune_allocation()
    tensors = [torch.empty(3_000_000 + n, dtype=torch.uint8) for n in range(4)]
    print(sum(t.data_ptr() % resource.getpagesize() == 0 for t in tensors), flush=True)
    os._exit(0)
"""
ASKED = "THP_MEM_ALLOC_ENABLE"


def test_the_peak_counts_what_was_held():
    """In bytes, of this process, within the machine's memory."""
    block = bytearray(b"x") * 50_000_000
    assert len(block) < peak_rss_bytes() < host_bytes()


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be tuned")


@pytest.mark.recipe
@GLIBC
def test_freed_memory_is_there_at_once():
    """A block as large as one just freed touches no page that the system must clear first."""
    faults = [
        int(subprocess.check_output([sys.executable, "-c", COUNT_FAULTS.format(tunes=tunes)]))
        for tunes in (False, True)
    ]
    assert faults[1] < 100 < faults[0]


@GLIBC
def test_freed_memory_is_given_back_when_asked():
    """A hole of the heap too; what was not asked for stays."""
    said = subprocess.check_output([sys.executable, "-c", HELD_AFTER], text=True)
    kept, returned = map(int, said.split())
    assert kept < 1_000_000 < 60_000_000 < returned


@GLIBC
@pytest.mark.recipe
def test_large_tensors_begin_on_a_page():
    """All of them, also once torch was imported; unasked, torch does not do so."""
    unasked = {name: value for name, value in os.environ.items() if name != ASKED}
    said = subprocess.check_output([sys.executable, "-c", FIRST_TENSORS], env=unasked)
    assert [int(line) for line in said.split()] == [0, 4 if HUGE_PAGES.is_dir() else 0]
