"""Scores stand for merges: the runtime's way and the tokenizer's give the same tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from qat.export.gguf_sentencepiece import BYTES, SPACE, best_pieces, merged_pieces, scores_of_merges
from qat.export.gguf_vocabulary import BYTE, CONTROL, NORMAL, USER_DEFINED, read_vocabulary

CONTROLS = ("<unk>", "<s>", "</s>")
WORDS = ("the", "then", "there", "lake", "like", "water", "waters", "in", "into", "it", "12", "\n")
PREFIX = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
GEMMA = normalizers.Replace(" ", SPACE)


def pieces_of_words():
    """Return ids of controls, bytes, characters, and every start of every word."""
    starts = [
        SPACE * leading + word[:end]
        for word in WORDS
        for end in range(2, len(word) + 1)
        for leading in (0, 1)
    ]
    characters = sorted({*"".join(WORDS), SPACE})
    return {
        text: place
        for place, text in enumerate(dict.fromkeys([*CONTROLS, *BYTES, *starts, *characters]))
    }


def merging_tokenizer(normalizer=PREFIX, merges=None, own=(), **options):
    """Return a tokenizer as Hugging Face makes them of SentencePiece's BPE."""
    ids = pieces_of_words()
    merges = generate_merges(ids) if merges is None else merges
    backend = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizer
    for name, value in options.items():
        setattr(backend, name, value)
    return finished(backend, own)


def unigram_tokenizer():
    """Return a tokenizer as Hugging Face makes them of SentencePiece's unigrams."""
    ids = [text for text in pieces_of_words() if text not in BYTES]
    scores = [
        (text, 0.0 if text in CONTROLS else -1.0 - place / 7) for place, text in enumerate(ids)
    ]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return finished(backend)


def finished(backend, own=()):
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROLS])
    backend.add_tokens([AddedToken(text, normalized=False) for text in own])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TEXTS = st.lists(st.sampled_from([*WORDS, " ", "  ", "x", "\u00e9", "th", "\U0001f680"])).map(
    "".join
)


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_merging_by_scores_is_merging_by_ranks(text):
    """Bytes where a character is no token."""
    tokenizer, ids = MERGING, pieces_of_words()
    scores = scores_of_merges(generate_merges(ids), ids, CONTROLS)
    expected = tokenizer(text, add_special_tokens=False).input_ids
    escaped = (" " + text).replace(" ", SPACE) if text else ""
    assert merged_pieces(escaped, ids, scores) == expected


@pytest.mark.recipe
@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_the_best_sum_of_scores_is_the_tokenizers(text):
    """Neighbouring characters that are no tokens are one unknown token."""
    vocabulary = read_vocabulary(UNIGRAM, 400)
    ids = {text: place for place, text in enumerate(vocabulary.tokens)}
    usual = {t: vocabulary.scores[ids[t]] for t in ids if vocabulary.types[ids[t]] == NORMAL}
    escaped = text.replace(" ", SPACE)
    if escaped and not escaped.startswith(SPACE):
        escaped = SPACE + escaped
    expected = UNIGRAM(text, add_special_tokens=False).input_ids
    assert best_pieces(escaped, {**ids, "": 0}, usual) == expected


MERGING, UNIGRAM = merging_tokenizer(), unigram_tokenizer()


@pytest.mark.parametrize(("normalizer", "adds_space"), [(PREFIX, True), (GEMMA, False)])
def test_a_vocabulary_says_what_runtimes_ask(normalizer, adds_space):
    """Types of all kinds, a better score for an earlier merge, and how text begins."""
    vocabulary = read_vocabulary(merging_tokenizer(normalizer, own=["<table>", "\n\n"]), 400)
    assert (vocabulary.model, vocabulary.adds_space) == ("llama", adds_space)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert [kinds[t] for t in ("<s>", "<0x0A>", "th", "<table>")] == [
        CONTROL,
        BYTE,
        NORMAL,
        USER_DEFINED,
    ]
    assert scores["th"] > scores["the"] > scores[f"{SPACE}waters"]
    assert vocabulary.special_ids == {"bos": 1, "eos": 2, "unk": 0}
    assert read_vocabulary(UNIGRAM, 400).model == "t5"


def test_tokenizers_that_runtimes_do_not_follow_are_refused():
    """A pair that never merges, text that is changed first, splits inside of a token."""
    few = generate_merges(pieces_of_words())[:-1]
    with pytest.raises(ValueError, match="never merges .* no SentencePiece model"):
        read_vocabulary(merging_tokenizer(merges=few), 400)
    changed = normalizers.Sequence([normalizers.Lowercase(), PREFIX])
    with pytest.raises(ValueError, match="cut text otherwise.*export --to hf"):
        read_vocabulary(merging_tokenizer(changed), 400)
    split = pre_tokenizers.Digits(individual_digits=True)
    with pytest.raises(ValueError, match="cut text otherwise"):
        read_vocabulary(merging_tokenizer(pre_tokenizer=split), 400)


def test_what_runtimes_put_before_a_text_is_said(caplog):
    """Metaspace adds no space to one that is there, nor after a control token."""
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    with caplog.at_level("INFO", logger="qat"):
        read_vocabulary(merging_tokenizer(None, pre_tokenizer=metaspace), 400)
    assert caplog.text.count("runtimes put a space") == 2
