"""Commands whose output goes to a bucket of a real S3 server on loopback."""

import os
import re
import shutil
from functools import partial

import fsspec
import pytest

from qat.cli.commands import main
from qat.storage import download
from qat.storage.files import read_json, sha256_of_file
from qat.storage.mirror import Mirror
from tests.recipes.test_kill import flags, kill_when, rows_of, start  # noqa: F401 a fixture
from tests.servers import bucket, cutting_proxy, name_server
from tests.tiny import tiny_llama, tiny_shards

pytestmark = pytest.mark.recipe
STEPS = 12


def is_copied(folder, step):
    """Return whether a run's state of a step, or of a later one, lies at its address."""
    least = f"state/step_{step:07d}"
    receipts = folder.glob("runs/.run-*.json")
    return any(least <= name for path in receipts for name in states_in(path))


def states_in(receipt):
    """Return the names of a receipt's files that declare a state whole."""
    return [name for name in read_json(receipt)["files"] if name.endswith("/state.json")]


@pytest.fixture(params=["train", "pretrain"])
def command(request, flags, tmp_path):  # noqa: F811 the fixture
    """A run that saves a state now and then, without its output, and its models' weight file."""
    often = {"--max-steps": STEPS, "--intervals.save-steps": 3, "--intervals.eval-steps": 4}
    if request.param == "train":
        flags = [*flags]
        for flag, value in often.items():
            flags[flags.index(flag) + 1] = str(value)
        return ["train", *flags], "student.safetensors"
    tiny_llama().config.save_pretrained(tmp_path / "shape")
    flags = ["--arch", tmp_path / "shape", "--data-dir", tiny_shards(tmp_path), "--seq-len", 16]
    flags += ["--batch-size", 4, "--intervals.log-steps", 1, "--device", "cpu", "--dtype", "fp32"]
    flags += [word for pair in often.items() for word in pair]
    return ["pretrain", *map(str, flags)], "model.safetensors"


def test_a_run_goes_on_where_its_machine_was_lost(command, tmp_path, monkeypatch):
    """Killed with SIGKILL, its folder removed: the bucket has all that it takes to go on.

    Losses and weights are those of a run that was never interrupted.
    """
    (verb, *asked), weights = command
    assert main(verb, [*asked, "--output-dir", str(tmp_path / "straight")]) == 0
    with bucket(monkeypatch):
        command = [verb, *asked, "--output-dir", "s3://bucket/deep/run"]
        machine = tmp_path / "lost"
        machine.mkdir()
        monkeypatch.chdir(machine)
        kill_when(start(*command), partial(is_copied, machine, 6))
        shutil.rmtree(machine / "runs")
        machine = tmp_path / "next"
        machine.mkdir()
        monkeypatch.chdir(machine)
        process = start(*command)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        assert int(re.search(r"resuming from step (\d+)", err)[1]) >= 6
        assert not (machine / "s3:").exists()
        (folder,) = machine.glob("runs/run-*")
        copy = tmp_path / "copy"
        fsspec.filesystem("s3").get("bucket/deep/run/", str(copy), recursive=True)
    for run in (folder, copy):
        assert rows_of(run) == rows_of(tmp_path / "straight")
        for name in ("best", "final"):
            sums = [sha256_of_file(one / name / weights) for one in (run, tmp_path / "straight")]
            assert sums[0] == sums[1]


def test_cut_connections_cost_time_alone(tmp_path, monkeypatch):
    """Every other connection ends after 2 MB, in both directions: the right bytes arrive."""
    monkeypatch.setattr(download, "WAIT_SECONDS", 0.01)
    folder, address = tmp_path / "run", "s3://bucket/run"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(os.urandom(5 << 20))
    files = {path.name: path for path in folder.iterdir()}
    with bucket(monkeypatch) as port, cutting_proxy(port, 2 << 20) as (worse_port, cut):
        name_server(monkeypatch, worse_port)
        Mirror(folder, address).push(files)
        assert cut
        cut.clear()
        other = Mirror(tmp_path / "other", address)
        assert other.bring(lambda *_: True)
        assert cut
        found = {path.name: path.read_bytes() for path in other.folder.iterdir()}
    assert found == {name: path.read_bytes() for name, path in files.items()}
