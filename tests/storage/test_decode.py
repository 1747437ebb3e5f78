import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from qat.benchmark.probes import Fitting, Probe, TooLarge
from qat.cache.manifest import CacheManifest
from qat.model.checkpoint import CheckpointHeader
from qat.model.packaged import Source
from qat.pipelines.compress_stages import Kept
from qat.runtime.device import says_out_of_memory
from qat.storage.decode import Count, FileName, as_type, is_own_mistake, naming, read_as, reading
from qat.storage.mirror import Pushed
from qat.storage.receipt import Receipt
from qat.storage.registry import StoredItem
from qat.train.state import Progress

ANY_JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=3),
    max_leaves=8,
)
SCHEMAS = (CacheManifest, CheckpointHeader, Receipt, StoredItem, Progress)
SCHEMAS += (Fitting, Kept, Probe, Pushed, Source, TooLarge)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    name: FileName
    count: Count | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    inner: tuple[Inner, ...]
    share: int | float = 0
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.share == 3:
            raise ValueError("share is 3")


def written(path, value):
    path.write_text(json.dumps(value))
    return path


def test_a_file_comes_back_as_its_type(tmp_path):
    """Nested values too; an int in the place of a float stays one, so that its JSON is the same."""
    path = written(tmp_path / "a.json", {"inner": [{"name": "x"}], "share": 0, "more": {"a": [1]}})
    found = read_as(path, Outer)
    assert found == Outer(inner=(Inner(name="x"),), share=0, more={"a": [1]})
    assert type(found.share) is int


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "Expected `object`, got `int`"),
        ({}, "inner is missing"),
        ({"inner": [{"name": 3}]}, r"inner\[0\]\.name: Expected `str`, got `int`"),
        ({"inner": [{"name": "../x"}]}, r"inner\[0\]\.name"),
        ({"inner": [{"name": "x\n"}]}, r"inner\[0\]\.name"),
        ({"inner": [{"name": "x", "count": -1}]}, r"inner\[0\]\.count"),
        ({"inner": [{"name": "x", "count": 2**70}]}, r"inner\[0\]\.count"),
        ({"inner": [{"name": "x", "count": True}]}, r"inner\[0\]\.count"),
        ({"inner": [{"name": "x", "other": 1}]}, r"inner\.other is no field"),
        ({"inner": [], "other": 1}, "other is no field"),
        ({"inner": [], "share": 3}, "share is 3"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, value, said):
    """It names the file, the field and what to do."""
    path = written(tmp_path / "a.json", value)
    with pytest.raises(ValueError, match=said) as caught:
        read_as(path, Outer, remedy="do this")
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; do this")


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(value=ANY_JSON, schema=some.sampled_from(SCHEMAS))
def test_any_value_is_the_type_or_refused_in_one_line(value, schema):
    """No schema lets an error of Python through, whatever stands in a file."""
    refused = None
    try:
        found = as_type(value, schema, "FILE")
    except ValueError as error:
        refused, found = error, None
    assert refused is None or not is_own_mistake(refused)
    assert isinstance(found, schema) or str(refused).startswith("FILE: ")


@pytest.mark.parametrize("text", ["", "{", "[" * 30_000, "NaN", "1e999", "Infinity", "9" * 5000])
def test_what_is_no_json_is_named(tmp_path, text):
    """Also what Python would read, or would end in its own words on."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not JSON .*make it again"):
        read_as(path, Outer)


def test_what_a_library_raises_names_the_file(tmp_path):
    """Whatever its type; what the system says of a file keeps its own words."""
    said = r"x\.bin cannot be read \(no such key\); do this"
    with pytest.raises(ValueError, match=said), reading("x.bin", "do this"):
        raise LookupError("no such key")
    with pytest.raises(FileNotFoundError, match="none"), reading("x.bin"):
        (tmp_path / "none").read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 8 bytes. Error code 12"
        ),
    ],
)
def test_too_little_memory_is_no_damage(error):
    """No remedy tells to remove what may be the only state of a run."""
    with pytest.raises(ValueError, match="free some memory") as told, reading("state", "remove it"):
        raise error
    assert "remove" not in str(told.value)
    assert says_out_of_memory(str(told.value))


def test_a_process_that_has_gone_is_no_damage():
    """Its own error tells so."""
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="closed by peer"), reading("state"):
        raise lost


def test_a_refusal_gets_the_name_once_and_a_mistake_of_ours_does_not():
    """An own ValueError that nobody raised on purpose still ends in a traceback."""
    with pytest.raises(ValueError, match="^x: wrong; do this$"), naming("x"), naming("x"):
        raise ValueError("wrong; do this")
