"""A case: one damaged copy, one command that reads it, and what its end must be like."""

import contextlib
import faulthandler
import io
import json
import os
import pickle
import resource
import shutil
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from random import Random

from qat.cli.commands import main
from tests.fuzz.mutate import mutate
from tests.fuzz.readers import Reader
from tests.kill.writers import without_clock
from tests.tiny import quick_fits

MOST_SECONDS = 60
NOT_FINITE = "computes no finite numbers"  # of what the number is, the command line names
MOST_BYTES = 1 << 30  # of addresses, beyond what the process had before the case


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int | None
    out: str
    said: str
    trace: str | None
    grown_bytes: int
    """Most memory that it held beyond what there was."""

    @property
    def result(self) -> object:
        """The closing line without what the clock gives; None where it failed."""
        lines = self.out.splitlines()
        return without_clock(json.loads(lines[-1])) if self.code == 0 and lines else None


UNTOUCHED: dict[str, Outcome] = {}  # by the command line


@dataclass(frozen=True)
class Verdict:
    """How a case ended."""

    case: str
    """READER:NUMBER."""
    code: int | None
    problem: str | None
    """None where the end is as it must be; cases with the same one have the same cause."""
    told: str
    """What the command said last, or the end of its traceback."""
    seconds: float


def run_case(reader: Reader, number: int, made: Path, root: Path, *, keep: bool = False) -> Verdict:
    """Damage a copy of what a reader reads, run a command on it, judge its end.

    Args:
        reader: Who reads.
        number: Of the case; everything follows from it and the reader's name.
        made: The folder of all things.
        root: A folder that is made anew for the case.
        keep: Whether it stays.
    """
    rng = Random(f"{reader.name}:{number}")
    case, out = fresh_copy(reader, made, root)
    pattern = rng.choice(reader.files)
    file = rng.choice(sorted(path for path in case.glob(pattern) if path.is_file()))
    before = file.read_bytes()
    what = mutate(file, rng)
    is_sealed = reader.seal is not None and rng.random() < 0.7
    if is_sealed:
        with contextlib.suppress(Exception):  # what cannot be sealed stays as it is
            reader.seal(case)
    is_same = file.is_file() and file.read_bytes() == before
    is_guarded = not is_sealed and any(file.match(one) for one in reader.sealed)
    line = rng.choice(reader.commands).format(case=case, out=out, made=made, file=file)
    # Before the case: what is imported at a first call counts for the untouched files.
    untouched = untouched_end(reader, line, made, root)
    started = time.perf_counter()
    end = call(line.split())
    seconds = time.perf_counter() - started
    code, said, trace = end.code, end.said, end.trace
    names = {file.name, file.stem, file.parent.name, str(root), NOT_FINITE, *reader.names}
    problem = judge(code, said, trace, root, names)
    if problem is None:
        if (is_same or (is_guarded and code == 0)) and end.result != untouched.result:
            problem = f"another result than the untouched {file.name} gives"
        elif end.grown_bytes > 2 * untouched.grown_bytes + reader.spare_bytes:
            problem = f"takes {end.grown_bytes:,} bytes, untouched {untouched.grown_bytes:,}"
    if problem is None and not is_same and is_guarded and code == 0 and "inspect" in line:
        problem = f"a change of {file.name} is not found"
    if problem is None and seconds > MOST_SECONDS:
        problem = f"takes more than {MOST_SECONDS} s"
    told = trace or (said.rstrip("\n").splitlines() or [""])[-1]
    if not keep:
        shutil.rmtree(root, ignore_errors=True)
    name = f"{reader.name}:{number} ({what} of {file.name}{', sealed' if is_sealed else ''})"
    return Verdict(f"{name}: qat {line}", code, problem, told, seconds)


def fresh_copy(reader: Reader, made: Path, root: Path) -> tuple[Path, Path]:
    """Make a case's folder anew; return the copy of what is read, and an empty folder."""
    shutil.rmtree(root, ignore_errors=True)
    case, out = root / "in" / reader.source, root / "out"
    shutil.copytree(made / reader.source, case)
    out.mkdir()
    return case, out


def untouched_end(reader: Reader, line: str, made: Path, root: Path) -> Outcome:
    """Return what a case's command does with the untouched files, run once a process."""
    if line not in UNTOUCHED:
        kept = root.with_name("kept")
        shutil.rmtree(kept, ignore_errors=True)  # of a process that died
        root.rename(kept)
        fresh_copy(reader, made, root)
        UNTOUCHED[line] = call(line.split())
        shutil.rmtree(root)
        kept.rename(root)
    return UNTOUCHED[line]


def call(words: list[str]) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = held_bytes() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before, code, trace = peak_bytes(), None, None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quick_fits():
            code = main(words[0], words[1:])
    except BaseException:  # noqa: BLE001 whatever it is, it is the finding
        trace = traceback.format_exc()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return Outcome(code, out.getvalue(), err.getvalue(), trace, peak_bytes() - before)


def peak_bytes() -> int:
    """Return the most memory that this process held since its peak was set back."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def held_bytes() -> int:
    """Return the bytes of this process's address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def judge(
    code: int | None, said: str, trace: str | None, root: Path, names: Collection[str]
) -> str | None:
    """Return what is wrong with an end, None where nothing is; `names` are those of the damage."""
    escaped = [path for path in (root.parent, Path("/tmp"), root) if (path / "escaped").exists()]
    if escaped or {path.name for path in root.iterdir()} - {"in", "out"}:
        return "a file outside"
    if trace is not None:
        return f"traceback: {place_of(trace)}"
    if code == 0:
        return None
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code != 2 or len(errors) != 1 or "Traceback" in said:
        return f"code {code} with {len(errors)} lines"
    if not any(name in errors[0] for name in names):
        return f"names no file: {shape(errors[0])}"
    if ";" not in errors[0]:
        return f"names no remedy: {shape(errors[0])}"
    return None


def shape(line: str) -> str:
    """Return a message without what differs from case to case."""
    return " ".join(
        word for word in line.split() if not any(c.isdigit() or c == "/" for c in word)
    )[:100]


def place_of(trace: str) -> str:
    """Return the last line of this package in a traceback, and the error."""
    lines = trace.strip().splitlines()
    ours = [n for n, one in enumerate(lines) if "/qat/" in one and one.lstrip().startswith("File")]
    where = lines[ours[-1]].split("/qat/")[-1].replace('", line ', ":") if ours else "?"
    return f"{where}: {lines[-1].split(':')[0]}"


def run_cases(reader: Reader, numbers: range, made: Path, root: Path) -> list[Verdict]:
    """Run cases in children of this process, and return how each ended.

    A child that dies costs one case, which is a finding, and leaves this process as it was.
    """
    found: list[Verdict] = []
    while len(found) < len(numbers):
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            os.close(reads)
            with os.fdopen(writes, "wb") as file:
                for number in numbers[len(found) :]:
                    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
                    pickle.dump(run_case(reader, number, made, root), file)
                    file.flush()
            os._exit(0)
        os.close(writes)
        with os.fdopen(reads, "rb") as file, contextlib.suppress(EOFError):
            while True:
                found.append(pickle.load(file))
        _, status = os.waitpid(child, 0)
        if status:
            case = f"{reader.name}:{numbers[len(found)]}"
            found.append(Verdict(case, None, f"the process died, status {status}", "", 0.0))
    return found


def findings(verdicts: list[Verdict]) -> str:
    """Return the cases that ended as they must not, those of one cause together."""
    causes: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.problem is not None:
            causes.setdefault(verdict.problem, []).append(verdict)
    parts = []
    for problem, cases in sorted(causes.items(), key=lambda item: -len(item[1])):
        told = "\n    ".join(cases[0].told.strip().splitlines()[-4:])
        parts.append(f"{len(cases)} x {problem}\n  {cases[0].case}\n    {told}")
    return "\n".join(parts)
