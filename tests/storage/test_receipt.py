import json
import shutil

import pytest

from qat.storage.receipt import Verified, read_receipt, receipt_path, write_receipt


@pytest.fixture
def folder(tmp_path):
    """A folder with a receipt."""
    made = tmp_path / "thing"
    (made / "inner").mkdir(parents=True)
    (made / "a.bin").write_bytes(b"a" * 100)
    (made / "inner" / "b.txt").write_text("b")
    write_receipt(made, "gs://bucket/thing.tgz", "0" * 64)
    return made


def test_a_receipt_comes_back(folder):
    """With its source and the files that it is about; a file more does not void it."""
    (folder / "more").write_text("more")
    receipt = read_receipt(folder)
    assert (receipt.source, receipt.sha256) == ("gs://bucket/thing.tgz", "0" * 64)
    assert set(receipt.files) == {"a.bin", "inner/b.txt"}


@pytest.mark.parametrize("change", ["other size", "other time", "missing", "no folder"])
def test_a_changed_folder_has_no_receipt(folder, change):
    """A receipt is about the files as they were written."""
    if change == "other size":
        (folder / "a.bin").write_bytes(b"short")
    elif change == "other time":
        (folder / "a.bin").write_bytes(b"b" * 100)
    elif change == "missing":
        (folder / "inner" / "b.txt").unlink()
    else:
        folder.rename(folder.with_name("other"))
    assert read_receipt(folder) is None


def test_a_receipt_of_another_version_is_none(folder):
    """What has other fields is not trusted, what is no JSON is named."""
    receipt_path(folder).write_text(json.dumps({"source": "x"}))
    assert read_receipt(folder) is None
    receipt_path(folder).write_text("{")
    with pytest.raises(ValueError, match=r"fetched\.json is not JSON"):
        read_receipt(folder)


def test_what_was_found_of_a_file_holds_until_it_changes(folder):
    """In another process as well; another finding, content or file is not known."""
    Verified(folder).add("a.bin", "sum", 9)
    assert Verified(folder).holds("a.bin", "sum", 9)
    assert not Verified(folder).holds("a.bin", "sum", 8)
    assert not Verified(folder).holds("inner/b.txt", "sum", 9)
    path, status = folder / "a.bin", (folder / "a.bin").stat()
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert not Verified(folder).holds("a.bin", "sum", 9)
    Verified(folder).path.write_text("[]")
    assert Verified(folder).known == {}
