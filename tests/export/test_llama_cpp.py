"""What is told where llama.cpp's library is absent or broken; the library is in tests/parity."""

from types import SimpleNamespace

import pytest

from qat.export import llama_cpp

open_library = llama_cpp.open_library.__wrapped__  # not the one that another test opened


def test_an_absent_library_is_an_import_error(monkeypatch, tmp_path):
    """Also where the wheel's folder is there without it."""
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _name: None)
    with pytest.raises(ImportError, match="xllamacpp is not installed"):
        open_library()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _name: found)
    with pytest.raises(ImportError, match="holds no library"):
        open_library()
    (tmp_path / "xllamacpp.so").write_bytes(b"no library")
    with pytest.raises(OSError, match="xllamacpp"):
        open_library()


def test_only_errors_are_kept(monkeypatch):
    """They say why a file does not load; progress does not."""
    monkeypatch.setattr(llama_cpp, "MESSAGES", [])
    llama_cpp.keep_errors(llama_cpp.ERROR, b"bad magic\n", None)
    llama_cpp.keep_errors(llama_cpp.ERROR - 1, b"loading tensors\n", None)
    assert llama_cpp.MESSAGES == ["bad magic"]


def test_a_file_that_does_not_load_says_why(monkeypatch, tmp_path):
    """With the library's own words and the remedy."""

    def load(*_arguments):
        llama_cpp.keep_errors(llama_cpp.ERROR, b"bad magic", None)

    library = SimpleNamespace(
        llama_context_default_params=llama_cpp.Parameters,
        llama_model_default_params=llama_cpp.Parameters,
        llama_model_load_from_file=load,
    )
    monkeypatch.setattr(llama_cpp, "open_library", lambda: library)
    with pytest.raises(ValueError, match=r"does not load .*a\.gguf \(bad magic\); export it again"):
        llama_cpp.LlamaCpp(tmp_path / "a.gguf")
