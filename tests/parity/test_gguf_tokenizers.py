"""llama.cpp reads the tokenizer in a file as Hugging Face reads its own, on 1,000 lines."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from qat.export.gguf_vocabulary import IGNORES_MERGES, PROBE, SPLITS
from qat.export.llama_cpp import LlamaCpp
from qat.export.to_gguf import export_to_gguf
from qat.model.load import load_tokenizer
from tests.export.test_gguf_sentencepiece import CONTROLS, PREFIX
from tests.export.test_gguf_vocabulary import KNOWN
from tests.parity.test_runtimes import need
from tests.tiny import save_tiny, tiny_llama

pytestmark = pytest.mark.parity

SPEEDRUN = Path(__file__).parents[2] / "speedrun"
NUM_LINES = 1000
OWN = ["\n", "\n\n", "\u2581\u2581", "<table>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def lines():
    """Return lines of answers and of Markdown; the first ones are odd."""
    records = (SPEEDRUN / "data" / "instructions.jsonl").read_text().splitlines()
    texts = [value for record in records for value in json.loads(record).values() if value]
    texts += (SPEEDRUN / "log.md").read_text().splitlines()
    found = [line for text in texts for line in text.splitlines() if line.strip()]
    return [PROBE, "  two\t\ttabs  ", "\n\n\n\n", "   ", *found][:NUM_LINES]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lines):
    """Return a function that trains SentencePiece once a kind and gives the folder."""
    need("sentencepiece", "sentencepiece")
    from sentencepiece import SentencePieceTrainer

    def train(kind, own=()):
        folder = tmp_path_factory.mktemp(kind)
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=1200,
            model_type=kind,
            byte_fallback=kind == "bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=list(own),
            minloglevel=2,
        )
        (folder / "config.json").write_text("{}")
        return folder

    return train


def pieces(folder):
    """Return the pieces of a SentencePiece model with their scores."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]


def finished(model, **parts):
    """Return a tokenizer of a model, its control tokens apart."""
    backend = Tokenizer(model)
    for name, value in parts.items():
        setattr(backend, name, value)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROLS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


def differing(tmp_path, tokenizer, texts):
    """Export a model with a tokenizer and return the texts that llama.cpp cuts otherwise."""
    need("xllamacpp", "xllamacpp")
    assert len(texts) == NUM_LINES
    folder = save_tiny(tmp_path / "base", tiny_llama(vocab_size=len(tokenizer) + 5), tokenizer)
    model = tiny_llama(vocab_size=len(tokenizer) + 5)
    export_to_gguf(model, tmp_path / "a.gguf", text_source=folder, dtype=torch.float16)
    runtime, tokenizer = LlamaCpp(tmp_path / "a.gguf"), load_tokenizer(folder)
    read = {text: runtime.tokenize(text, add_special=True, parse_special=True) for text in texts}
    return [text for text in texts if read[text] != tokenizer(text).input_ids]


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_bpe(tmp_path, lines, name):
    """With the splits of each name, special tokens included."""
    pre_tokenizer = KNOWN[name][0].backend_tokenizer.pre_tokenizer
    backend = Tokenizer(models.BPE(ignore_merges=name in IGNORES_MERGES))
    backend.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    texts = [f"a <|endoftext|>{line}" if len(line) % 7 == 0 else line for line in lines]
    assert differing(tmp_path, tokenizer, texts) == []


@pytest.mark.parametrize("family", ["llama", "gemma", "prepend"])
def test_sentencepiece_bpe(tmp_path, lines, trained, family):
    """As the classes of transformers read `tokenizer.model`, and as older folders hold it."""
    folder = trained("bpe", OWN if family == "gemma" else ())
    if family == "llama":  # it adds no space to one that is there, which runtimes do
        texts = [line.strip() or "a" for line in lines]
        assert differing(tmp_path, LlamaTokenizer.from_pretrained(folder), texts) == []
    elif family == "gemma":
        tokenizer = GemmaTokenizer.from_pretrained(folder, bos_token="<s>", eos_token="</s>")
        assert differing(tmp_path, tokenizer, lines) == []
    else:
        ids = {text: place for place, (text, _score) in enumerate(pieces(folder))}
        model = models.BPE(
            ids, generate_merges(ids), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
        assert differing(tmp_path, finished(model, normalizer=PREFIX), lines) == []


def test_sentencepiece_unigrams(tmp_path, lines, trained):
    """Unknown characters included."""
    model = models.Unigram(pieces(trained("unigram")), unk_id=0)
    tokenizer = finished(model, pre_tokenizer=pre_tokenizers.Metaspace())
    texts = [line.strip() or "a" for line in lines]
    assert differing(tmp_path, tokenizer, texts) == []
