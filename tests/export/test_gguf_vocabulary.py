"""How text is split is found by behaviour; what cannot be written is refused."""

from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qat.export.gguf_vocabulary import (
    CONTROL,
    HEAD,
    NORMAL,
    SPLITS,
    TAIL,
    UNUSED,
    find_pre,
    probe_ends,
    read_vocabulary,
)
from tests.tiny import SPECIAL_TOKENS, VOCAB_SIZE, tiny_tokenizer


def splitter(*parts):
    """Return something with the pre-tokenizer that a tokenizer would have."""
    chain = pre_tokenizers.Sequence(list(parts))
    return SimpleNamespace(backend_tokenizer=SimpleNamespace(pre_tokenizer=chain))


def by_regex(pattern):
    return splitter(
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
KNOWN = {
    "gpt-2": (splitter(WORDS), False),
    "smollm": (splitter(pre_tokenizers.Digits(individual_digits=True), WORDS), False),
    "qwen2": (by_regex(HEAD + r"\p{N}" + TAIL), False),
    "dbrx": (by_regex(HEAD + r"\p{N}{1,3}" + TAIL), False),
    "llama-bpe": (by_regex(HEAD + r"\p{N}{1,3}" + TAIL), True),
}


@pytest.mark.parametrize("name", KNOWN)
def test_splits_are_known_by_what_they_do(name):
    """Each family's own pre-tokenizer is recognized as its name, and as no other."""
    tokenizer, ignores_merges = KNOWN[name]
    assert find_pre(tokenizer, ignores_merges=ignores_merges) == name


def test_names_differ_on_the_probe_text():
    """No two names stand for the same splits of it and the same way to merge."""
    cuts = {(*probe_ends(name), ignores) for name, (_tokenizer, ignores) in KNOWN.items()}
    assert len(cuts) == len(KNOWN) == len(SPLITS)


def test_unknown_splits_are_refused():
    """Splitting at spaces alone, and known splits with the other habit of merging."""
    with pytest.raises(ValueError, match="no known pre.*gpt-2, smollm"):
        find_pre(splitter(pre_tokenizers.WhitespaceSplit()), ignores_merges=False)
    with pytest.raises(ValueError, match="no known pre"):
        find_pre(KNOWN["qwen2"][0], ignores_merges=True)


def test_every_row_of_the_embedding_has_a_token():
    """Ids of the tokenizer keep their places; rows beyond are unused."""
    vocabulary = read_vocabulary(tiny_tokenizer(), VOCAB_SIZE)
    known = tiny_tokenizer().get_vocab()
    assert len(vocabulary.tokens) == len(vocabulary.types) == VOCAB_SIZE
    assert all(vocabulary.tokens[index] == text for text, index in known.items())
    assert vocabulary.types.count(CONTROL) == len(SPECIAL_TOKENS)
    assert vocabulary.types.count(UNUSED) == VOCAB_SIZE - len(known)
    assert vocabulary.types[known["a"]] == NORMAL
    assert vocabulary.special_ids == {"eos": 258, "pad": 256}
    assert not vocabulary.adds_bos
    assert vocabulary.chat_template == tiny_tokenizer().chat_template


def test_tokenizers_without_a_home_are_refused():
    """Word pieces, text that is changed first, no byte-level splits, more ids than rows."""
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0})))
    with pytest.raises(ValueError, match="WordPiece with byte_fallback=False.*export --to hf"):
        read_vocabulary(words, VOCAB_SIZE)
    changed = tiny_tokenizer()
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="Lowercase has no GGUF key"):
        read_vocabulary(changed, VOCAB_SIZE)
    split = tiny_tokenizer()
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    split.backend_tokenizer.decoder = None
    with pytest.raises(ValueError, match="without byte-level splits"):
        read_vocabulary(split, VOCAB_SIZE)
    with pytest.raises(ValueError, match="id 260, the embedding 100 rows"):
        read_vocabulary(tiny_tokenizer(), 100)
