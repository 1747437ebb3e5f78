"""Tokenizers learned from text, as transformers loads them and GGUF files hold them.

SentencePiece's BPE and unigrams become a `tokenizer.json` that cuts text as the library itself
does: no normalization, a space before the text, single digits, bytes for unknown characters.
Training sees a bounded draw of lines, so its memory does not grow with the data.
"""

import io
import random
from collections.abc import Iterable, Iterator
from itertools import islice

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from qat.data.config import TokenizerKind

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"  # ids 0, 1, 2 of every SentencePiece model
END_OF_TEXT = "<|endoftext|>"
SPACE = "\u2581"
LINE_CHARACTERS = 4096  # longer lines are cut: SentencePiece leaves out what it finds too long
# Partial sums of unigrams are added thread by thread, so another count gives other last digits.
NUM_THREADS = 2
SPM_KINDS = {"sentencepiece-bpe": "bpe", "sentencepiece-unigram": "unigram"}


def train_tokenizer(
    texts: Iterable[str],
    kind: TokenizerKind,
    *,
    vocab_size: int,
    special_tokens: tuple[str, ...] = (),
    num_lines: int,
    seed: int = 0,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of exactly `vocab_size` tokens; the same texts give the same one.

    Args:
        texts: Documents, in an order of their own.
        kind: What is learned.
        vocab_size: Special tokens, and bytes, included.
        special_tokens: Further tokens that no text gives, such as those of a chat template.
        num_lines: Lines to learn from at most, drawn evenly from all.
        seed: Of the draw.

    Raises:
        ValueError: If the text is too little for so many tokens, or there are too few for it.
    """
    lines = draw_lines(texts, num_lines, seed)
    if not lines:
        raise ValueError("--data has no text to learn a tokenizer from; give more of it")
    if kind in SPM_KINDS:
        return from_sentencepiece(
            train_sentencepiece(lines, SPM_KINDS[kind], vocab_size, special_tokens),
            SPM_KINDS[kind],
            special_tokens,
        )
    return train_byte_level(lines, vocab_size, special_tokens)


def draw_lines(texts: Iterable[str], num_lines: int, seed: int) -> list[str]:
    """Return so many lines of texts, every one as likely as the others.

    Source:
        Vitter 1985, Random sampling with a reservoir, algorithm R.
    """
    lines, generator = lines_of(texts), random.Random(seed)
    kept = list(islice(lines, num_lines))
    for count, line in enumerate(lines, start=len(kept) + 1):
        place = generator.randrange(count)
        if place < num_lines:
            kept[place] = line
    return kept


def lines_of(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of texts that hold anything, long ones in pieces."""
    for text in texts:
        for line in text.splitlines():
            if line.strip():
                for start in range(0, len(line), LINE_CHARACTERS):
                    yield line[start : start + LINE_CHARACTERS]


def train_sentencepiece(
    lines: list[str], kind: str, vocab_size: int, special_tokens: tuple[str, ...]
) -> bytes:
    """Return a SentencePiece model, as its file holds it."""
    from sentencepiece import SentencePieceTrainer

    made = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=made,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            control_symbols=list(special_tokens),
            max_sentence_length=4 * LINE_CHARACTERS,  # bytes
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        why = str(error).partition("] ")[2].partition(". ")[0] or str(error)
        raise ValueError(
            f"--vocab-size {vocab_size} does not fit this text ({why}); give more text, or another "
            "size"
        ) from error
    return made.getvalue()


def from_sentencepiece(
    model_file: bytes, kind: str, special_tokens: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    """Return the tokenizer that cuts text as a SentencePiece model does."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=model_file)
    pieces = [(model.id_to_piece(place), model.get_score(place)) for place in range(len(model))]
    ids = {piece: place for place, (piece, _score) in enumerate(pieces)}
    if kind == "bpe":
        backend = Tokenizer(
            models.BPE(
                ids, mergeable(ids, model), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True
            )
        )
    else:
        backend = Tokenizer(models.Unigram(pieces, unk_id=ids[UNKNOWN], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(special((UNKNOWN, BEGIN, END, *special_tokens)))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END
    )


def mergeable(ids: dict[str, int], model: object) -> list[tuple[str, str]]:
    """Return the pairs that merge, the first one first: tokens of text only, no bytes."""
    usual = {
        piece: place
        for piece, place in ids.items()
        if not (model.is_control(place) or model.is_unknown(place) or model.is_byte(place))
    }
    return generate_merges(usual, {piece: model.get_score(place) for piece, place in usual.items()})


def train_byte_level(
    lines: list[str], vocab_size: int, special_tokens: tuple[str, ...]
) -> PreTrainedTokenizerFast:
    """Return byte-level BPE: digits apart, then GPT-2's words, in a file's `pre` as smollm."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special((END_OF_TEXT, *special_tokens)),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    if (found := backend.get_vocab_size()) != vocab_size:
        raise ValueError(
            f"--vocab-size {vocab_size} does not fit this text, which gives {found} tokens; give "
            "more text, or another size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def special(tokens: tuple[str, ...]) -> list[AddedToken]:
    """Return tokens that are cut out of a text as they stand."""
    return [AddedToken(token, special=True, normalized=False) for token in tokens]
