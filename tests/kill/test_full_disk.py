"""Disks that are full in the middle: one line that says so, nothing half, the same bytes later."""

import shutil
import subprocess

import pytest

from tests.kill.writers import WRITERS, contents, end_of, make_everything, run

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
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
def test_a_full_disk_is_told_and_costs_nothing(writer, made, tmp_path, disk):
    """Whichever write it is that fails, the same command goes on when there is space."""
    straight, said, (folder, resize) = tmp_path / "straight", tmp_path / "said", disk
    straight.mkdir()
    assert end_of(run(writer.line.format(made=made, out=straight))) == 0
    expected = contents(straight)
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
