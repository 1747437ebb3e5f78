import shutil

import pytest

from qat.pipelines.stored_items import check_content, kind_of
from qat.storage.registry import StoredItem
from tests.tiny import save_tiny, tiny_cache, tiny_llama


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_cache(tmp_path_factory.mktemp("cache"), name="tiny")


def test_content_tells_a_cache_from_a_checkpoint(cache, tmp_path):
    """Also where it is nested in a folder; the name does not matter."""
    shutil.copytree(cache, tmp_path / "q4" / "q4")
    assert kind_of(tmp_path / "q4") == "cache"
    assert kind_of(save_tiny(tmp_path / "cache", tiny_llama())) == "checkpoint"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        kind_of(tmp_path / "none")


def test_what_is_not_expected_is_refused(cache, tmp_path):
    """Another kind, another fingerprint."""
    check_content(StoredItem(kind="cache", name="tiny"), cache)
    with pytest.raises(ValueError, match="the registry says 0123"):
        check_content(StoredItem(kind="cache", name="tiny", fingerprint="0123"), cache)
    with pytest.raises(OSError, match="no cache"):
        check_content(StoredItem(kind="cache", name="m"), save_tiny(tmp_path / "m", tiny_llama()))
