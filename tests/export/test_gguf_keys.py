"""What a GGUF file says of the model, its tokenizer and its positions."""

import pytest
import torch

from qat.export.gguf_file import read_tensor_records
from qat.export.gguf_keys import rope_tensors
from qat.export.to_gguf import export_to_gguf
from qat.grids.blocks import BLOCK_TYPES
from tests.tiny import tiny_student

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("tied", [True, False])
def test_the_gguf_package_reads_keys_and_tensors(tmp_path, text_source, tied):
    """All keys that a runtime asks for; a tied head is left out."""
    student = tiny_student("qwen3", "gguf:q4_0", tied=tied)
    export_to_gguf(student, tmp_path / "out.gguf", text_source=text_source, head="q8_0")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    config = student.config
    for key, value in {
        "general.architecture": "qwen3",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "qwen3.context_length": config.max_position_embeddings,
        "qwen3.embedding_length": config.hidden_size,
        "qwen3.block_count": config.num_hidden_layers,
        "qwen3.feed_forward_length": config.intermediate_size,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 16,
        "qwen3.attention.value_length": 16,
        "qwen3.rope.dimension_count": 16,
        "qwen3.rope.freq_base": config.rope_parameters["rope_theta"],
        "qwen3.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.padding_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
    }.items():
        assert keys[key] == value, key
    assert keys["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert len(keys["tokenizer.ggml.tokens"]) == config.vocab_size
    assert "<|im_start|>" in keys["tokenizer.chat_template"]
    types = {tensor.name: int(tensor.tensor_type) for tensor in reader.tensors}
    assert ("output.weight" in types) != tied
    assert types["token_embd.weight"] == BLOCK_TYPES["q8_0"].number
    assert types["blk.0.attn_q_norm.weight"] == types["output_norm.weight"] == 0
    assert types["blk.1.ffn_down.weight"] == BLOCK_TYPES["q4_0"].number


def test_llama_3_positions_divide_slow_frequencies(tmp_path, text_source):
    """What transformers computes: our factors divide its plain inverse frequencies."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    student = tiny_student("llama", "gguf:q4_0")
    plain = student.model.rotary_emb.inv_freq.clone()
    student.config.rope_parameters = rope
    expected = type(student.model.rotary_emb)(student.config).inv_freq
    (factors,) = rope_tensors(student.config).values()
    assert torch.allclose(plain / factors, expected, rtol=1e-5)
    export_to_gguf(student, tmp_path / "out.gguf", text_source=text_source)
    assert "rope_freqs.weight" in read_tensor_records(tmp_path / "out.gguf")
