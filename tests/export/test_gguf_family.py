"""Families are written as runtimes compute them; what they cannot express is refused in a line."""

import pytest
import torch

from qat.export.gguf_family import FAMILIES, require_family
from qat.export.gguf_file import read_tensor_records, read_weight
from qat.export.gguf_size import planned_file_bytes
from qat.export.to_gguf import export_to_gguf
from qat.model.surgery import quantized_layers
from tests.tiny import plan_of, quantize_plainly, save_tiny, tiny_model

NAMES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3", "olmo2")
NAMES += ("gemma2", "gemma3")
UNTIED = ("olmo2",)
NORM = "output_norm.weight"
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def family_model(family, **changes):
    """Return a tiny model whose norms and biases are not those of a fresh one."""
    model = tiny_model(family, tied=family not in UNTIED, **changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def test_every_family_has_a_tiny_model():
    """So that none is left out below."""
    assert {tiny_model(name).config.model_type for name in NAMES} == FAMILIES.keys()


@pytest.mark.parametrize("family", NAMES)
def test_each_family_is_exact_and_as_large_as_planned(tmp_path, family):
    """To the byte; norms hold what the model adds to them."""
    model, plan = family_model(family), "all=gguf:q4_0, mlp=gguf:q4_1, embed=gguf:q8_0"
    folder = save_tiny(tmp_path / "base", model)
    planned = planned_file_bytes(model.config, plan_of(model, plan), text_source=folder)
    report = export_to_gguf(quantize_plainly(model, plan), tmp_path / "a.gguf", text_source=folder)
    assert report["exact"] is True
    assert report["tensors_compared"] > len(quantized_layers(model)) > 0
    assert planned == report["file_bytes"]
    norm = read_weight(tmp_path / "a.gguf", read_tensor_records(tmp_path / "a.gguf")[NORM])
    assert torch.equal(norm, model.model.norm.weight + (1.0 if "gemma" in family else 0.0))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama with silu, the model has hidden_act=gelu"),
        ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "=0.5"),
        ("qwen3", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}, r"\[1, 1, 0, 1\]"),
        ("phi3", {"head_dim": 32}, "heads of 16 weights, the model has head_dim=32"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar=16, the model has 8"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping=None"),
        ("gemma2", {"final_logit_softcapping": None}, "the model has none"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("olmo2", {"tied": True}, "olmo2 with tie_word_embeddings=False"),
        ("gemma2", {"tied": False}, "gemma2 with tie_word_embeddings=True"),
        ("qwen3", {"attention_bias": True}, "without model.layers.0.self_attn.o_proj.bias"),
    ],
)
def test_what_runtimes_compute_otherwise_is_refused(tmp_path, family, changes, reason):
    """Before the tokenizer is read or a byte written, with the value and the remedy."""
    with pytest.raises(ValueError, match=f"{reason}.*export --to hf"):
        export_to_gguf(
            tiny_model(family, **changes),
            tmp_path / "a.gguf",
            text_source=tmp_path / "absent",
            dtype=torch.float16,
        )
    assert not list(tmp_path.iterdir())


def test_an_unknown_family_names_those_that_are_known():
    """In one line."""
    with pytest.raises(ValueError, match="cohere has no tensor map.*llama, mistral.*gemma3") as it:
        require_family(tiny_model("cohere").config)
    assert "\n" not in str(it.value)


def test_a_window_that_runtimes_ignore_is_said(caplog):
    """They attend further than the model does."""
    with caplog.at_level("INFO", logger="qat"):
        require_family(tiny_model("phi3", sliding_window=32).config)
    assert "beyond 32 tokens" in caplog.text
