import pytest

from qat.storage.registry import likely_kind, read_registry

NAMES = {"L64", "L128", "q4_fp32", "q4_fp16", "q2_init", "q2_best", "q2_0.53"}


def test_the_registry_has_the_short_names_of_the_seeds():
    """Each with its kind, its name, and where it lies."""
    registry = read_registry()
    assert set(registry) >= NAMES
    assert registry["L64"].name == "alpaca_chat_think_both_L64_K64_R128"
    assert registry["q4_fp32"].stored_as == "anemll_v2_q4_a4_from_v1_finetuned.tgz"
    for item in registry.values():
        assert item.stored_as.startswith(item.name)
        assert item.notes


def test_a_broken_registry_is_refused_with_the_name(tmp_path):
    """Its file is edited by hand, so the message says where; no file is no name."""
    path = tmp_path / "registry.toml"
    assert read_registry(path) == {}
    for text, said in (
        ("[L64", "is not TOML"),
        ('[L64]\nkind = "thing"\nname = "x"\n', "L64: kind: .*'thing'"),
        ('[L64]\nkind = "cache"\nname = "x"\ncolor = 1\n', "L64: .*color"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_registry(path)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("https://host/qwen3_caches/x.tgz", "cache"),
        ("gs://bucket/qwen3_runs/a_L64_K64_R128.tgz", "checkpoint"),
        ("/stores/a_L64_K64_R128.tar.lz4", "cache"),
        ("/stores/student.tgz", "checkpoint"),
    ],
)
def test_an_address_tells_what_it_likely_holds(address, kind):
    """The store's folder decides, then the form of the name."""
    assert likely_kind(address) == kind
