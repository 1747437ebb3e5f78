"""What the process holds, and what it keeps of what it frees."""

import subprocess
import sys

from qat.memory import host_bytes, peak_rss_bytes

COUNT_FAULTS = """
import resource
from qat.memory import keep_freed_memory
if {keeps}:
    keep_freed_memory()
block = bytearray(b"x") * 64_000_000
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray(b"x") * 64_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_the_peak_counts_what_was_held():
    """In bytes, of this process, within the machine's memory."""
    block = bytearray(b"x") * 50_000_000
    assert len(block) < peak_rss_bytes() < host_bytes()


def test_freed_memory_is_there_at_once():
    """A block as large as one just freed touches no page that the system must clear first."""
    faults = [
        int(subprocess.check_output([sys.executable, "-c", COUNT_FAULTS.format(keeps=keeps)]))
        for keeps in (False, True)
    ]
    assert faults[1] < 100 < faults[0]
