import pytest

from qat.storage.hub import parse_hub_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", None)),
        ("hf:Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", None)),
        ("Qwen/Qwen3-0.6B@v1", ("Qwen/Qwen3-0.6B", "v1")),
        ("hf:here/x@refs/pr/1", ("here/x", "refs/pr/1")),
        ("here/x", None),
        ("runs/q2", None),
        ("gpt2", None),
        ("hf:gpt2", None),
        ("a/b/c", None),
        ("../a/b", None),
        ("/a/b", None),
        (".hidden/x", None),
        ("a/b/", None),
        ("", None),
    ],
)
def test_a_name_is_told_from_a_path(tmp_path, monkeypatch, name, expected):
    """A missing folder of a run went to the model hub as the name of an owner and a model."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_hub_name(name) == expected
