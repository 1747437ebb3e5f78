"""Commands killed at random instants, then run to their end: the same bytes as never killed."""

import os
import shutil
import signal
import time
from random import Random

import pytest

from tests.kill.writers import (
    WRITERS,
    contents,
    end_of,
    half_made,
    kill_after,
    make_everything,
    run,
)

pytestmark = pytest.mark.kill
KILLS = int(os.environ.get("KILLS") or 5)
DENSE = 7  # renames of a command that are all tried; after them, every DENSEth
SWEPT = tuple(writer.name for writer in WRITERS if writer.name != "compress")  # its work folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands read."""
    folder = tmp_path_factory.mktemp("kill") / "made"
    make_everything(folder)
    return folder


def check_ended(writer, out, expected, told):
    """A command has written what it always does, and nothing half made is left."""
    found = contents(out)
    assert {name: found.get(name) for name in expected} == expected, told
    if writer.name in SWEPT:
        assert found == expected, told
        assert not list(half_made(out)), told


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
def test_a_killed_command_ends_like_one_that_was_not(writer, made, tmp_path, record_property):
    """Whatever the instant, the next call has the same bytes, and nothing half made has a name."""
    rng, out = Random(writer.name), tmp_path / "out"

    def start(said=None):
        out.mkdir(exist_ok=True)
        return run(writer.line.format(made=made, out=out), said)

    def finish(told=""):
        said = tmp_path / "said"
        assert end_of(start(said)) == 0, f"{told} {said.read_text()[-2000:]}"

    finish()
    shutil.rmtree(out)
    started = time.perf_counter()
    finish()
    seconds, expected = time.perf_counter() - started, contents(out)
    expected = {name: value for name, value in expected.items() if writer.decides(name)}
    kills = tries = 0
    while kills < KILLS:
        shutil.rmtree(out)
        tries += 1
        assert tries <= 4 * KILLS + 8, "it ends before it can be killed"
        instants = [rng.uniform(0, seconds) for _ in range(rng.choice((1, 1, 2)))]
        kills += sum(kill_after(start(), instant) for instant in instants)
        told = f"killed after {instants} of {seconds:.3f} s, try {tries}"
        finish(told)
        check_ended(writer, out, expected, told)
    record_property("kills", kills)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
def test_a_command_killed_between_two_files_goes_on(writer, made, tmp_path, record_property):
    """Before whichever rename: the next call has the same bytes, and nothing half made stays."""
    out, said = tmp_path / "out", tmp_path / "said"
    line = writer.line.format(made=made, out=out)
    out.mkdir()
    assert end_of(run(line)) == 0
    expected, rename, kills = contents(out), 1, 0
    expected = {name: value for name, value in expected.items() if writer.decides(name)}
    while True:
        shutil.rmtree(out)
        out.mkdir()
        code = end_of(run(line, said, kill_at=rename))
        if code != -signal.SIGKILL:
            assert code == 0, said.read_text()[-2000:]
            break
        told = f"killed before rename {rename}"
        assert end_of(run(line, said)) == 0, f"{told} {said.read_text()[-2000:]}"
        check_ended(writer, out, expected, told)
        kills, rename = kills + 1, rename + (1 if rename < DENSE else DENSE)
    assert kills
    record_property("kills", kills)
