import shutil
import uuid
from pathlib import Path

import pytest

from qat.cache.manifest import CacheMismatch
from qat.cache.read import TeacherCache
from qat.pipelines.open_cache import open_cache, open_teacher_cache
from tests.tiny import save_tiny, tiny_cache, tiny_llama


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A cache nested in a folder, and its teacher's folder."""
    folder = tmp_path_factory.mktemp("open")
    made = tiny_cache(folder / "made")
    (folder / "outer").mkdir()
    return made.rename(folder / "outer" / "cache"), folder / "made" / "teacher"


def test_no_folder_is_no_cache(places):
    """What needs none is given none, and nothing is read."""
    assert open_cache(None, places[1]) is None


def test_a_cache_is_found_where_it_is_nested(places):
    """An archive may hold a folder in a folder of the same name."""
    cache, teacher = places
    found = open_teacher_cache(cache.parent)
    assert found.fingerprint == open_cache(cache, teacher).fingerprint


def test_the_cache_of_another_model_is_refused(places, tmp_path):
    """By the width of its logits and by its teacher's weights."""
    cache, teacher = places
    with pytest.raises(CacheMismatch, match="teacher_weights"):
        open_cache(cache, teacher, "0" * 16)
    wide = save_tiny(tmp_path / "wide", tiny_llama(vocab_size=300))
    with pytest.raises(CacheMismatch, match="vocab_size"):
        open_cache(cache, wide)


@pytest.mark.recipe
def test_a_cache_is_built_at_an_address_and_read_there(tmp_path, monkeypatch):
    """What reads it needs no folder; a lost one is built on from what was copied."""
    monkeypatch.chdir(tmp_path)
    address = f"memory:///{uuid.uuid4().hex}"
    built = tiny_cache(tmp_path, output_dir=Path(address), name="cache", num_sequences=60)
    plain = TeacherCache.open(tiny_cache(tmp_path, num_sequences=60))
    assert built.parent == Path("caches")
    shutil.rmtree(built)
    cache = open_cache(Path(f"{address}/cache"), tmp_path / "teacher")
    assert cache.fingerprint == plain.fingerprint
    ids = cache.sequence_ids()
    for name, field in plain.fields(ids).items():
        assert field.equal(cache.fields(ids)[name])
    built = tiny_cache(tmp_path, output_dir=Path(address), name="cache", num_sequences=60)
    assert open_teacher_cache(built).fingerprint == plain.fingerprint
    assert not list(tmp_path.glob("memory:*"))
