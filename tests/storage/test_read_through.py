import hashlib
import os
import uuid

import fsspec
import pytest

from qat.storage.archive import ArchiveMismatch
from qat.storage.read_through import ReadThrough


@pytest.fixture
def there(tmp_path, monkeypatch):
    """An address with three files of 100 bytes, their checksums, and a place for copies."""
    monkeypatch.chdir(tmp_path)
    address = f"memory:///{uuid.uuid4().hex}"
    system, root = fsspec.url_to_fs(address)
    sums = {}
    for name in "abc":
        data = os.urandom(100)
        system.pipe_file(f"{root}/{name}", data)
        sums[name] = hashlib.sha256(data).hexdigest()
    return address, sums


def test_what_was_read_is_here(there):
    """Also for another reader when the address is gone."""
    address, sums = there
    content = {name: ReadThrough(address).path(name, sums[name]).read_bytes() for name in sums}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in content.items()} == sums
    system, root = fsspec.url_to_fs(address)
    system.rm(root, recursive=True)
    assert ReadThrough(address).path("a", sums["a"]).read_bytes() == content["a"]
    with pytest.raises(FileNotFoundError, match="check the address"):
        ReadThrough(address).path("d", sums["a"])


def test_the_least_recently_read_makes_room(there):
    """Of two that fit, the one that was read again stays; what makes room can still be read."""
    address, sums = there
    source = ReadThrough(address, most_bytes=250)
    for age, name in enumerate("ab"):
        os.utime(source.path(name, sums[name]), (age, age))
    source.path("a", sums["a"])
    source.path("c", sums["c"])
    assert [path.name for _, _, path in source.kept()] == ["a", "c"]
    assert len(source.path("b", sums["b"]).read_bytes()) == 100
    assert sum(size for _, size, _ in source.kept()) == 200


def test_a_damaged_copy_is_fetched_again(there):
    """A damaged original is refused."""
    address, sums = there
    ReadThrough(address).path("a", sums["a"]).write_bytes(b"x" * 100)
    again = ReadThrough(address).path("a", sums["a"])
    assert hashlib.sha256(again.read_bytes()).hexdigest() == sums["a"]
    with pytest.raises(ArchiveMismatch, match="sha256"):
        ReadThrough(address).path("b", sums["a"])


def test_a_file_without_checksum_is_the_present_one(there):
    """A manifest that was written over is read anew."""
    address, _ = there
    source = ReadThrough(address)
    source.path("a")
    system, root = fsspec.url_to_fs(address)
    system.pipe_file(f"{root}/a", b"new")
    assert source.path("a").read_bytes() == b"new"
