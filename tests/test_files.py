import errno
import hashlib
import json

import pytest

from qat.files import (
    atomic_file,
    atomic_folder,
    canonical_json,
    fingerprint,
    read_json,
    sha256_of_file,
    write_json,
    write_text,
)


def test_canonical_json_does_not_depend_on_order():
    """Equal values have one text, so one fingerprint; different values differ."""
    assert canonical_json({"b": [1, 2], "a": None}) == '{"a":null,"b":[1,2]}'
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    assert fingerprint({"a": 2}) != fingerprint({"a": 3})


def test_a_fingerprint_is_the_start_of_the_sha256():
    """Sixteen hex digits of the canonical text's sha256, the same on every machine."""
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:16]


def test_nan_has_no_json():
    """NaN would make a file that other programs cannot read."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_json_comes_back(tmp_path):
    """What is written is read, also into a folder that is not there yet."""
    path = tmp_path / "new" / "value.json"
    write_json(path, {"a": [1, 2.5, "x"]})
    assert read_json(path) == {"a": [1, 2.5, "x"]} == json.loads(path.read_text())


@pytest.mark.parametrize("content", [b"{broken", b"\xff\xfe\x00", b""])
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    """The message tells which file, so that it can be removed."""
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        read_json(path)


def test_sha256_is_that_of_the_bytes(tmp_path):
    """The streamed sum equals the sum of the whole."""
    path = tmp_path / "data"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_of_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path):
    """A disk that fills up in the middle costs the new file only."""
    path = tmp_path / "file"
    write_text(path, "former")

    def write_until_the_disk_is_full():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_until_the_disk_is_full()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "former"


def test_the_file_appears_only_when_whole(tmp_path):
    """Inside the block there is nothing under the final name; after it, the mode is usual."""
    path = tmp_path / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "whole"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_folder_leaves_the_former_one(tmp_path):
    """The same for a folder of several files."""
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("former")

    def write_until_interrupted():
        with atomic_folder(path) as temporary:
            (temporary / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_until_interrupted()
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert (path / "a").read_text() == "former"


def test_a_folder_is_replaced_as_one(tmp_path):
    """Files of the former folder do not linger in the new one, nor aside."""
    path = tmp_path / "folder"
    for name in ("a", "b"):
        with atomic_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert [entry.name for entry in path.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert path.stat().st_mode & 0o777 == 0o755
