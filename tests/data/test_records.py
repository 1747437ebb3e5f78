import json
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from qat.data.records import read_records, source_name, source_revision
from tests.tiny import tiny_records, write_jsonl

RECORDS = tiny_records(5)


def write_source(folder, kind):
    """Write the records in one of the forms and return the path."""
    path = folder / f"data.{kind.partition(' ')[0]}"
    if kind == "jsonl":
        return write_jsonl(path, RECORDS)
    if kind == "json list":
        path = path.with_suffix(".json")
        path.write_text(json.dumps(RECORDS))
    elif kind == "json object":
        path = path.with_suffix(".json")
        path.write_text(json.dumps({"version": 1, "data": RECORDS}))
    elif kind == "json lines":
        path = write_jsonl(path.with_suffix(".json"), RECORDS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json list", "json object", "json lines", "parquet"])
def test_every_form_gives_the_same_records(tmp_path, kind):
    """The form of the file does not show in the records."""
    assert list(read_records(str(write_source(tmp_path, kind)))) == RECORDS


def test_a_folder_is_its_files_by_name(tmp_path):
    """Files are read in the order of their names; others are left alone."""
    write_jsonl(tmp_path / "b.jsonl", RECORDS[2:])
    write_jsonl(tmp_path / "a.jsonl", RECORDS[:2])
    (tmp_path / "notes.pdf").write_bytes(b"x")
    assert list(read_records(str(tmp_path))) == RECORDS
    (tmp_path / "c.txt").write_text("one document")
    assert list(read_records(str(tmp_path)))[-1] == {"text": "one document"}


def test_the_revision_follows_the_bytes(tmp_path):
    """A copy under another name has the same revision; a changed byte has another."""
    first = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    copy = write_jsonl(tmp_path / "b.jsonl", RECORDS)
    other = write_jsonl(tmp_path / "c.jsonl", RECORDS[1:])
    assert source_revision(str(first)) == source_revision(str(copy))
    assert source_revision(str(first)) != source_revision(str(other))
    assert source_name(str(first)) == "a.jsonl"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.json", b'[{"a": 1}, 3]', "item 1"),
        ("a.txt", b"\xff\xfe\xff", "UTF-8"),
        ("a.jsonl", b"\xff\xfe\xff", "UTF-8"),
        ("a.parquet", b"not parquet", "parquet"),
        ("a.csv", b"a,b", r"\.jsonl"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path, name, content, said):
    """The message holds the file and where in it the fault lies."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        list(read_records(str(path)))
    assert name in str(caught.value)


def test_a_path_that_is_not_there_is_no_hub_name(tmp_path):
    """What looks like a path is told missing; anything else is sought on the hub."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_records(str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_records("none.jsonl"))
    with pytest.raises(FileNotFoundError, match="no file, folder or hub data set"):
        list(read_records("owner/name"))


def test_a_hub_name_is_streamed_at_its_revision(monkeypatch):
    """What a name chooses reaches the hub's library; `name@revision:config:split` is all of it."""
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return RECORDS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(read_records("owner/name@v1")) == RECORDS
    usual = {"name": None, "split": "train", "streaming": True, "revision": None}
    assert calls.pop() == ("owner/name", {**usual, "revision": "v1"})
    list(read_records("owner/name:sample-10BT"))
    assert calls.pop() == ("owner/name", {**usual, "name": "sample-10BT"})
    list(read_records("owner/name@v1:en:validation"))
    assert calls.pop() == (
        "owner/name",
        {**usual, "name": "en", "split": "validation", "revision": "v1"},
    )
    list(read_records("hf:owner/name:en"))
    assert calls.pop() == ("owner/name", {**usual, "name": "en"})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_records("owner/name:a:b:c"))


def test_records_are_read_as_they_are(tmp_path):
    """Dates stay strings, each record has its own keys, a key may have values of several types."""
    records = [{"day": "2020-01-01"}, {"content": "x"}, {"content": ["y", {"z": None}]}]
    assert list(read_records(str(write_jsonl(tmp_path / "a.jsonl", records)))) == records
