"""The host's memory: what there is, what was held, how it is given out, and a limit on it."""

import ctypes
import os
import re
import sys
import time
from pathlib import Path

# getrusage of a child starts at its parent's peak, /proc counts from the program's start.
HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)
WATCH_SECONDS = 0.01  # at 2 to 5 GB a second of fresh pages, 50 MB late at most
# Numbers of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEPT_BYTES = 2**30  # a larger allocation goes back to the system when freed
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def tune_allocation() -> None:
    """Let glibc keep what a step frees, and torch begin large tensors on a page.

    By default every tensor above 32 MB is mapped anew, and the system clears each of its pages at
    the first touch: a third of a training step on a CPU. What is kept falls to pieces less where
    tensors begin on pages, which torch then asks the system to make large: 10 to 15% less memory
    for the same steps, and none slower.

    Torch looks at its first allocation, so this comes before any tensor. Other systems and C
    libraries are left alone.
    """
    if sys.platform == "linux":
        if HUGE_PAGES.is_dir():
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(M_ARENA_MAX, 1)  # a step takes what threads that load a model free


def return_freed() -> None:
    """Give freed memory back to the system, where glibc keeps it.

    For the end of a stage that left holes: what comes next has other sizes, does not fit them, and
    takes more on top. The pages cost their clearing when they are taken again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def host_bytes() -> int:
    """Return the host's memory, or the control group's share of it where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := HIGH_WATER.search(status.read_text())):
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def end_above(limit_bytes: int) -> None:
    """End the process, saying why, once it has held more than a limit."""
    while (held := peak_rss_bytes()) <= limit_bytes:
        time.sleep(WATCH_SECONDS)
    os.write(2, f"out of memory: held {held:,} bytes, the limit is {limit_bytes:,}\n".encode())
    os._exit(1)  # other threads are amidst a step
