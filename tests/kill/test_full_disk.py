"""Disks that are full in the middle: one line that says so, nothing half, the same bytes later."""

import shutil
import subprocess

import pytest
import torch
from safetensors import SafetensorError

from qat.export.to_gguf import export_to_gguf
from qat.legacy.torch_file import write_torch_file
from qat.storage.files import atomic_file, is_disk_full
from qat.train.state import Progress, whole_states, write_state
from tests.kill.writers import WRITERS, contents, end_of, make_everything, run
from tests.tiny import save_student, save_tiny, tiny_llama, tiny_student
from tests.train.test_state import make_run

pytestmark = pytest.mark.kill


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands read."""
    folder = tmp_path_factory.mktemp("full") / "made"
    make_everything(folder)
    return folder


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, and a way to change its size; skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted: that needs root and tmpfs")

    def resize(num_bytes):
        options = ["mount", "-o", f"remount,size={num_bytes}", str(folder)]
        subprocess.run(options, check=True, capture_output=True)

    yield folder, resize
    # torch keeps a file open that it could not write.
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def write_safetensors(folder, text_source):
    save_student(folder / "made", tiny_student(), text_source)


def write_gguf(folder, text_source):
    export_to_gguf(tiny_student(plan="deploy"), folder / "a.gguf", text_source=text_source)


def write_run_state(folder, _text_source):
    write_state(folder, Progress(step=1), make_run())


def write_pt(folder, _text_source):
    tensors = tiny_student().state_dict().items()
    with atomic_file(folder / "a.pt") as temporary:
        write_torch_file(temporary, ((k, v.float()) for k, v in tensors if torch.is_tensor(v)))


@pytest.mark.parametrize("write", [write_safetensors, write_gguf, write_run_state, write_pt])
def test_each_write_may_be_the_one_that_fails(write, disk, tmp_path):
    """It is told as a full disk at whatever size, and nothing half has a name."""
    folder, resize = disk
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    write(tmp_path / "straight", text_source)
    straight = tmp_path / "straight"
    needed = sum(path.stat().st_size for path in straight.rglob("*") if path.is_file())
    for share in range(0, 20, 2):
        resize(max(4096, share * needed // 20))
        with pytest.raises((OSError, SafetensorError)) as failed:
            write(folder, text_source)
        assert is_disk_full(failed.value) or "No space left" in str(failed.value)
        assert not whole_states(folder / "state")
        assert [path.name for path in folder.iterdir()] in ([], ["state"])
    resize(2 * needed + (1 << 20))
    write(folder, text_source)
    expected = {path.name for path in straight.iterdir()}
    assert {path.name for path in folder.iterdir()} == expected


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
def test_a_disk_that_takes_nothing_is_told(writer, made, tmp_path, disk):
    """One line, before long work or after; the same command goes on when it may write."""
    said, (folder, resize) = tmp_path / "said", disk
    resize(256 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, capture_output=True)
    line = writer.line.format(made=made, out=folder)
    code, told = end_of(run(line, said)), said.read_text()
    assert code == 2, told[-2000:]
    errors = [one for one in told.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1, told[-2000:]
    assert "Read-only file system" in errors[0]
    assert str(folder) in errors[0]
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True, capture_output=True)
    assert end_of(run(line, said)) == 0, said.read_text()[-2000:]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
def test_a_full_disk_is_told_and_costs_nothing(writer, made, tmp_path, disk):
    """Whichever write it is that fails, the same command goes on when there is space."""
    straight, said, (folder, resize) = tmp_path / "straight", tmp_path / "said", disk
    straight.mkdir()
    assert end_of(run(writer.line.format(made=made, out=straight))) == 0
    expected = {name: v for name, v in contents(straight).items() if writer.decides(name)}
    needed = sum(path.stat().st_size for path in straight.rglob("*") if path.is_file())
    line = writer.line.format(made=made, out=folder)
    for share in (0.3, 0.8):
        resize(max(8192, int(share * needed)))
        code, told = end_of(run(line, said)), said.read_text()
        assert code == 2, told[-2000:]
        errors = [one for one in told.splitlines() if one.startswith("error: ")]
        assert len(errors) == 1, told[-2000:]
        assert "space" in errors[0]
    resize(256 << 20)
    assert end_of(run(line, said)) == 0, said.read_text()[-2000:]
    found = contents(folder)
    assert found == {**found, **expected}
