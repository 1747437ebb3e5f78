"""Students on vector grids: every file holds what was trained, to the bit."""

import pytest
import torch

from qat.export.gguf_file import read_tensor_records, read_weight
from qat.export.gguf_size import planned_file_bytes
from qat.export.gguf_tensors import row_order
from qat.export.to_compressed_tensors import export_to_compressed_tensors
from qat.export.to_gguf import export_to_gguf
from qat.export.to_hf_quantized import export_to_hf_quantized
from qat.model.surgery import quantized_layers, thaw_indices
from tests.tiny import others_later, plan_of, save_tiny, tiny_llama, tiny_student

gguf = pytest.importorskip("gguf")

PARTS = {
    "mlp.down_proj": ("ffn_down", "iq2_s"),
    "mlp.up_proj": ("ffn_up", "iq2_xxs"),
    "mlp.gate_proj": ("ffn_gate", "iq3_s"),
    "self_attn.q_proj": ("attn_q", "iq2_xs"),
    "self_attn.o_proj": ("attn_output", "iq3_xxs"),
}
PLAN = ", ".join(
    ["linears=gguf:q4_0", *(f"*.{part}=gguf:{kind}" for part, (_, kind) in PARTS.items())]
)
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def text_source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), tiny_llama())


def moved_student(plan=PLAN):
    """Return a student of which half the layers follow latent weights and sub-scales that moved."""
    student = tiny_student("llama", plan, **SIZES)
    for layer in list(quantized_layers(student).values())[::2]:
        thaw_indices(layer)
        layer.latent_weight.data += 0.02 * torch.randn_like(layer.latent_weight)
        if "sub_scale" in layer.parts:
            layer.sub_scale.data += torch.randn_like(layer.sub_scale)
            layer.super_scale.data *= 1.01
    return student


@pytest.mark.recipe
def test_gguf_files_hold_what_was_trained(tmp_path, text_source):
    """Also from latent weights, and of q_proj, whose rows the runtime orders otherwise."""
    student = moved_student()
    path = tmp_path / "out.gguf"
    report = export_to_gguf(student, path, text_source=text_source)
    assert report["exact"] is True
    records = read_tensor_records(path)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    for part, (name, kind) in PARTS.items():
        record = records[f"blk.0.{name}.weight"]
        assert record.type_name == kind
        assert types[f"blk.0.{name}.weight"] == kind.upper()
        source = f"model.layers.0.{part}"
        order = row_order(student.config, f"{source}.weight")
        trained = student.get_submodule(source).fake_quantized_weight()
        found = read_weight(path, record)
        assert torch.equal(found, trained if order is None else trained[order])


def test_the_planned_size_is_that_of_the_file(tmp_path, text_source):
    """To the byte, before there is a student."""
    model = tiny_llama(**SIZES)
    student = tiny_student("llama", PLAN, **SIZES)
    export_to_gguf(student, tmp_path / "a.gguf", text_source=text_source)
    planned = planned_file_bytes(model.config, plan_of(model, PLAN), text_source=text_source)
    assert planned == (tmp_path / "a.gguf").stat().st_size


@pytest.mark.recipe
def test_the_plugin_computes_what_was_trained(tmp_path, text_source):
    """Weights as the plugin's layers form them, to the bit, and the same logits."""
    from transformers import AutoModelForCausalLM

    import qat.export.plugin  # noqa: F401 makes the model type known

    student = moved_student()
    plan = plan_of(student, PLAN).to_dict()
    export_to_hf_quantized(student, tmp_path / "a", text_source=text_source, plan=plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    for name, layer in quantized_layers(student).items():
        found = loaded.get_submodule(name).weight_on_grid()
        assert torch.equal(found, layer.fake_quantized_weight()), name
    token_ids = torch.arange(12).view(2, 6)
    assert torch.allclose(loaded(token_ids).logits, student(token_ids).logits, atol=1e-5)


def test_formats_of_scalars_refuse_the_grid(tmp_path, text_source):
    """By name, before anything is written."""
    with pytest.raises(ValueError, match=r"gguf:iq\d_\w+.*convert it first"):
        export_to_compressed_tensors(moved_student(), tmp_path / "a", text_source=text_source)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", others_later(sorted({kind for _, kind in PARTS.values()})))
def test_rows_that_are_no_super_blocks_are_refused(kind):
    """The message names the tensor, the rule and the remedy."""
    with pytest.raises(ValueError, match=r"down_proj.*128.*no multiple of the 256.*gguf:q4_0"):
        tiny_student("llama", f"linears=gguf:q4_0, *.down_proj=gguf:{kind}")
