"""Every quick command that writes, what it writes, and what of it must be the same every time."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from qat.cli.commands import main
from qat.storage.archive import pack_folder
from tests.tiny import quick_fits, save_tiny, tiny_cache, tiny_llama, tiny_records, write_jsonl

USUAL = "--device cpu --dtype fp32"
CLOCK = ("seconds", "per_second")  # the ends of names of what the clock gives
PLACES = ("peak_rss_bytes", "made_by", "output_dir", "path")
UNLIKE = ("environment.json",)  # tells of each session


@dataclass(frozen=True)
class Writer:
    """A command whose outputs lie below {out}; {made} has what it reads."""

    name: str
    line: str
    outputs: str = ""
    """The end of the names that must be the same every time; all when not given."""

    def decides(self, name: str) -> bool:
        """Return whether a file must be the same every time."""
        return name.endswith(self.outputs)


TOKENIZE = "tokenize --data {made}/data.jsonl --tokenizer {made}/teacher --shard-tokens 300 "
TOKENIZE += "--heldout-ratio 0.2 "
WRITERS = (
    Writer(
        "build-cache",
        "build-cache --teacher {made}/teacher --data {made}/data.jsonl --output-dir {out} "
        f"--name c --seq-len 16 --top-k 8 --batch-size 4 {USUAL}",
    ),
    Writer(
        "init-student",
        "init-student --model {made}/teacher --plan q2a4 --fit moments --cache-dir {made}/cache "
        f"--output {{out}}/s {USUAL}",
    ),
    Writer(
        "train",
        "train --checkpoint {made}/student --cache-dir {made}/cache --output-dir {out}/r "
        "--max-steps 8 --batch-size 2 --intervals.save-steps 1 --intervals.log-steps 1 "
        f"--intervals.eval-steps 4 --layers mlp {USUAL}",
    ),
    Writer(
        "compress",
        "compress --model {made}/teacher --data {made}/data.jsonl --size 70KB --to gguf "
        "--minutes 0 --num-sequences 16 --seq-len 16 --eval-sequences 2 --fit moments "
        f"--output {{out}}/a.gguf --work {{out}}/work {USUAL}",
        outputs=".gguf",  # the work folder tells of seconds
    ),
    Writer("export-hf", "export --checkpoint {made}/student --to hf --output {out}/hf"),
    Writer(
        "export-gguf",
        "export --checkpoint {made}/student --to gguf --dtype bf16 --output {out}/m.gguf",
    ),
    Writer("pack", "pack {made}/student --output {out}/s.tar.lz4"),
    Writer("fetch", "fetch {made}/student.tgz --output-dir {out}"),
    Writer("push", "push {made}/student --store {out}"),
    Writer(
        "train-tokenizer",
        "train-tokenizer --data {made}/data.jsonl --kind byte-level-bpe --vocab-size 280 "
        "--output {out}/v",
    ),
    Writer("tokenize", TOKENIZE + "--output-dir {out}/t"),
    Writer(
        "pretrain",
        "pretrain --arch {made}/teacher --data-dir {made}/shards --seq-len 8 --batch-size 2 "
        "--max-steps 6 --intervals.save-steps 1 --intervals.log-steps 1 --intervals.eval-steps 3 "
        f"--output-dir {{out}}/p {USUAL}",
    ),
)


def make_everything(folder: Path) -> None:
    """Make what the commands read."""
    cache = tiny_cache(folder, tiny_llama())
    shutil.move(cache, folder / "cache")
    save_tiny(folder / "teacher", tiny_llama())
    write_jsonl(folder / "data.jsonl", tiny_records(120))
    line = WRITERS[1].line.format(made=folder, out=folder).replace("/s ", "/student ")
    assert end_of(run(line)) == 0
    assert end_of(run((TOKENIZE + "--output-dir {made}/shards").format(made=folder))) == 0
    pack_folder(folder / "student", folder / "student.tgz")


def run(line: str, said: Path | None = None, kill_at: int = 0) -> int:
    """Start a command in a child of this process; return the child's id.

    With `kill_at` N it is killed where it would give a file or folder its Nth name.
    """
    child = os.fork()
    if child:
        return child
    if kill_at:
        die_at_rename(kill_at)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, also where a kill left it
    try:
        with (
            Path(said or os.devnull).open("w") as file,
            contextlib.redirect_stderr(file),
            contextlib.redirect_stdout(file),
            quick_fits(),
        ):
            code = main(line.split()[0], line.split()[1:])
    except BaseException as error:  # noqa: BLE001 a child must not go on as pytest
        Path(said or os.devnull).write_text(repr(error))
        code = 70
    os._exit(code)


def die_at_rename(number: int) -> None:
    """Kill this process, as the system does, in place of its Nth rename."""
    count, lock, renaming = itertools.count(1), threading.Lock(), (os.replace, os.rename)

    def counted(rename: Callable[..., None]) -> Callable[..., None]:
        def rename_or_die(*args: object, **kwargs: object) -> None:
            with lock:
                if next(count) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            rename(*args, **kwargs)

        return rename_or_die

    os.replace, os.rename = map(counted, renaming)


def end_of(child: int) -> int:
    """Wait for a child; return its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> bool:
    """Kill a child, as the system does, after some time; return whether it was still there."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return end_of(child) == -signal.SIGKILL


def contents(folder: Path) -> dict[str, object]:
    """Return all files of a folder by name, without what the clock says, locks and receipts."""
    return {
        path.relative_to(folder).as_posix(): stable(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in UNLIKE and not is_notice(path)
    }


def is_notice(path: Path) -> bool:
    """Return whether a file tells of what happened: a lock's owner, a receipt's times."""
    return path.name.startswith(".") and path.name.endswith((".lock", ".fetched.json"))


def stable(path: Path) -> object:
    """Return what of a file must be the same every time."""
    if path.suffix == ".json":
        return without_clock(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def without_clock(value: object) -> object:
    """Return nested values without those that the clock and the place give."""
    if isinstance(value, dict):
        return {
            key: without_clock(inner)
            for key, inner in value.items()
            if not key.endswith(CLOCK) and key not in PLACES
        }
    return [without_clock(inner) for inner in value] if isinstance(value, list) else value


def half_made(folder: Path) -> Iterator[str]:
    """Yield what killed processes left half made."""
    for path in folder.rglob(".*"):
        if not is_notice(path):
            yield path.name
