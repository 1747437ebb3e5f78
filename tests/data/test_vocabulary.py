"""What is learned cuts text as the library that learned it, and as files for runtimes say."""

from functools import cache
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from qat.data.chat import plain_texts
from qat.data.config import TokenizerKind
from qat.data.records import read_records
from qat.data.text import bos_id, tokenizer_sha256
from qat.data.vocabulary import draw_lines, from_sentencepiece, train_sentencepiece, train_tokenizer
from qat.export.gguf_vocabulary import read_vocabulary
from qat.model.load import load_tokenizer

KINDS = get_args(TokenizerKind)
VOCAB_SIZE = 600
SPECIAL = ("<|user|>", "<|end|>")


@cache
def texts():
    """Return the answers that the project ships."""
    return list(plain_texts(read_records("speedrun/data/instructions.jsonl"), "output"))[:300]


def learn(kind, **changes):
    plan = {"vocab_size": VOCAB_SIZE, "special_tokens": SPECIAL, "num_lines": 10_000, **changes}
    return train_tokenizer(texts(), kind, **plan)


learned = cache(learn)
WORDS = st.sampled_from(
    ["the", "answer", "is", " ", "  ", "\n", "\t", "42", "e\u0301", "\U0001f680"]
)
ANY = st.one_of(st.text(max_size=20), st.lists(WORDS, max_size=12).map("".join))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request):
    """A SentencePiece model, and the tokenizer made of it."""
    stored = train_sentencepiece(draw_lines(texts(), 10_000, 0), request.param, VOCAB_SIZE, SPECIAL)
    return SentencePieceProcessor(model_proto=stored), from_sentencepiece(
        stored, request.param, SPECIAL
    )


@settings(max_examples=60, deadline=None)
@given(ANY)
@example("  two\t\ttabs  \n\n and   spaces ")
def test_a_tokenizer_cuts_text_as_sentencepiece_does(model, text):
    """Token for token, unknown characters in bytes; of unigrams that are as likely, either."""
    library, tokenizer = model
    text = text.replace("\0", "").replace("\u2581", "")
    found, expected = tokenizer(text, add_special_tokens=False).input_ids, library.encode(text)
    if type(tokenizer.backend_tokenizer.model).__name__ == "Unigram":
        assert library.decode(found) == library.decode(expected)
        scores = (sum(map(library.get_score, ids)) for ids in (found, expected))
        assert next(scores) == pytest.approx(next(scores))
    else:
        assert found == expected


@pytest.mark.recipe
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(text=ANY)
def test_any_text_goes_through_and_comes_back(kind, text):
    """No character is lost, whether the tokenizer has seen it or not."""
    tokenizer = learned(kind)
    text = text.replace("\u2581", "")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.recipe
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_tokenizer_and_files_take_it(tmp_path, kind):
    """Special tokens are one token each, BOS is SentencePiece's, GGUF's keys can be made."""
    tokenizer = learned(kind)
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer_sha256(learn(kind)) == tokenizer_sha256(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer)
    assert loaded.eos_token_id is not None
    assert bos_id(loaded) == (None if kind == "byte-level-bpe" else 1)
    ids = loaded("a<|user|>b", add_special_tokens=False).input_ids
    assert ids.count(loaded.convert_tokens_to_ids("<|user|>")) == 1
    found = read_vocabulary(loaded, VOCAB_SIZE)
    assert found.model == {KINDS[0]: "llama", KINDS[1]: "t5", KINDS[2]: "gpt2"}[kind]
    assert len(found.tokens) == VOCAB_SIZE


@pytest.mark.recipe
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_the_text_does_not_give_is_refused(kind):
    """With the size, and what the library found."""
    with pytest.raises(ValueError, match="--vocab-size 100000 does not fit this text"):
        learn(kind, vocab_size=100_000)


def test_lines_are_drawn_evenly():
    """Each about as often as the others over many seeds; all of them where there are fewer."""
    numbers = [str(number) for number in range(8)]
    counts = dict.fromkeys(numbers, 0)
    for seed in range(400):
        for line in draw_lines(["\n".join(numbers[:4]), "\n".join(numbers[4:])], 2, seed):
            counts[line] += 1
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140
    assert draw_lines(numbers, 99, 0) == numbers
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([" \n"], "byte-level-bpe", vocab_size=300, num_lines=9)
