"""What the tests of all formats share."""

import pytest

from tests.tiny import save_tiny, tiny_llama


@pytest.fixture(scope="session")
def text_source(tmp_path_factory):
    """Return a folder with a tokenizer and its template."""
    return save_tiny(tmp_path_factory.mktemp("base"), tiny_llama())
