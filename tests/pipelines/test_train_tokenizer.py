from dataclasses import replace
from random import Random
from string import ascii_lowercase

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qat.data.config import TrainTokenizerConfig
from qat.export.config import ExportConfig
from qat.export.from_gguf import read_gguf_model
from qat.model.load import load_dense, load_tokenizer
from qat.pipelines.export import export
from qat.pipelines.train_tokenizer import train_tokenizer
from tests.tiny import tiny_records, write_jsonl

VOCABULARY = 200_005  # of Yxanul


def test_a_tokenizer_is_learned_once(tmp_path):
    """The second call finds it, and other settings are refused in the same folder."""
    data = write_jsonl(tmp_path / "a.jsonl", tiny_records())
    config = TrainTokenizerConfig(
        data=str(data), output=tmp_path / "made", vocab_size=290, kind="byte-level-bpe"
    )
    first = train_tokenizer(config)
    written = (config.output / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer(config) == first
    assert (config.output / "tokenizer.json").stat().st_mtime_ns == written
    assert len(load_tokenizer(first.tokenizer)) == first.tokens == 290
    with pytest.raises(ValueError, match="exists with vocab_size 290, asked for is 280"):
        train_tokenizer(replace(config, vocab_size=280))


@pytest.mark.recipe
def test_a_vocabulary_of_200005_tokens_is_learned_loaded_and_exported(tmp_path):
    """As many as Yxanul's; the GGUF of a model with it has every token and merge."""
    draw = Random(0)
    words = ["".join(draw.choices(ascii_lowercase, k=draw.randint(3, 9))) for _ in range(120_000)]
    lines = (" ".join(words[start : start + 50]) for start in range(0, len(words), 50))
    (tmp_path / "words.txt").write_text("\n".join(lines))
    model = tmp_path / "model"
    made = train_tokenizer(
        TrainTokenizerConfig(
            data=str(tmp_path / "words.txt"),
            output=tmp_path / "tokenizer",
            kind="byte-level-bpe",
            vocab_size=VOCABULARY,
        )
    )
    tokenizer = load_tokenizer(made.tokenizer)
    assert made.tokens == len(tokenizer) == VOCABULARY
    text = " ".join(words[:100])
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    tokenizer.save_pretrained(model)
    file = tmp_path / "model.gguf"
    export(ExportConfig(checkpoint=str(model), to="gguf", dtype="bf16", output=file))
    import gguf

    fields = gguf.GGUFReader(file).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == VOCABULARY
    assert len(fields["tokenizer.ggml.merges"].data) > 190_000
    ids = torch.tensor([[3, 5, VOCABULARY - 1]])
    found, expected = read_gguf_model(file, model), load_dense(model)
    logits = [one(input_ids=ids).logits.float() for one in (found, expected)]
    assert torch.allclose(*logits, atol=1e-2)
