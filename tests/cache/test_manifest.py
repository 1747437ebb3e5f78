import pytest
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qat.cache.config import BuildCacheConfig
from qat.cache.manifest import expected_identity, tokenizer_sha256
from tests.tiny import tiny_records, tiny_tokenizer, with_bos, write_jsonl


def lowercase(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def split_digits(tokenizer):
    before = tokenizer.backend_tokenizer.pre_tokenizer
    parts = [pre_tokenizers.Digits(individual_digits=True), before]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def add_token(tokenizer):
    tokenizer.add_tokens(["cat"])


@pytest.mark.parametrize("change", [lowercase, split_digits, with_bos, add_token])
def test_the_hash_covers_all_that_turns_text_into_ids(change):
    """The vocabulary alone let a tokenizer pass that gives other ids for the same text."""
    tokenizer = tiny_tokenizer()
    before = tokenizer_sha256(tokenizer), tokenizer_sha256(tokenizer, version=1)
    change(tokenizer)
    after = tokenizer_sha256(tokenizer), tokenizer_sha256(tokenizer, version=1)
    assert before[0] != after[0]
    assert (before[1] == after[1]) == (change is not add_token)


@pytest.mark.parametrize("change", [lambda _tokenizer: None, with_bos])
def test_the_hash_survives_saving_and_use(tmp_path, change):
    """Also by the class that a folder's config names; a call leaves padding and truncation set."""
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    expected = tokenizer_sha256(tokenizer)
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_sha256(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path / "one")
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = kind.from_pretrained(tmp_path / "one")
        assert tokenizer_sha256(loaded) == expected
    loaded.save_pretrained(tmp_path / "two")
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path / "two")) == expected


def identity_for(data, tokenizer):
    config = BuildCacheConfig(teacher="t", data=str(data))
    return expected_identity(config, tokenizer=tokenizer, teacher_weights="w", dtype="fp32")


def test_the_identity_says_how_blocks_begin_and_what_documents_see(tmp_path):
    """Records are separate; one plain text file is one document; a folder of them is several."""
    for folder in (tmp_path, tmp_path / "texts"):
        folder.mkdir(exist_ok=True)
        (folder / "a.txt").write_text("birds")
    (tmp_path / "texts" / "b.txt").write_text("boats")
    records = write_jsonl(tmp_path / "a.jsonl", tiny_records(3))
    found = {
        data: identity_for(data, tiny_tokenizer()).documents
        for data in (records, tmp_path / "a.txt", tmp_path / "texts")
    }
    assert list(found.values()) == ["separate", "joined", "separate"]
    plain, begun = identity_for(records, tiny_tokenizer()), with_bos(tiny_tokenizer())
    assert (plain.block_start, plain.block_start_id) == ("none", None)
    identity = identity_for(records, begun)
    assert (identity.block_start, identity.block_start_id) == ("bos", begun.bos_token_id)
    assert identity.fingerprint != plain.fingerprint
