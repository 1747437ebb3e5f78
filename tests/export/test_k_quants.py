"""Students on K-types and IQ4_XS: every file holds what was trained, to the bit."""

import pytest
import torch

from qat.export.gguf_file import read_tensor_records, read_weight
from qat.export.gguf_size import planned_file_bytes
from qat.export.gguf_tensors import row_order
from qat.export.to_compressed_tensors import export_to_compressed_tensors
from qat.export.to_gguf import export_to_gguf
from qat.export.to_hf_quantized import export_to_hf_quantized
from qat.export.to_mlx import export_to_mlx
from qat.model.surgery import quantized_layers, thaw_indices
from qat.quant.spec import K_FORMATS
from tests.tiny import others_later, plan_of, save_tiny, tiny_llama, tiny_student

gguf = pytest.importorskip("gguf")

SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
IN_FILE = ("attn_q", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
RULES = [f"*.{layer}=gguf:{name}" for layer, name in zip(LAYERS, K_FORMATS, strict=True)]
PLAN = ", ".join(["linears=gguf:q4_0", *RULES])


@pytest.fixture(scope="module")
def text_source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), tiny_llama())


@pytest.fixture(scope="module")
def student():
    """Return a student with a layer of each format, whose weights and integers training moved."""
    torch.manual_seed(0)
    student = tiny_student("llama", PLAN, **SIZES)
    for layer in quantized_layers(student).values():
        thaw_indices(layer)
        layer.latent_weight.data += 0.02 * torch.randn_like(layer.latent_weight)
        for name in layer.spec.scale.integer_bits:
            part = getattr(layer, name)
            part.data += torch.randn_like(part)
    return student


def test_gguf_files_hold_what_was_trained(student, tmp_path, text_source):
    """As many bytes as planned; also of q_proj, whose rows the runtime orders otherwise."""
    path = tmp_path / "out.gguf"
    report = export_to_gguf(student, path, text_source=text_source)
    assert report["exact"] is True
    plan = plan_of(student, PLAN)
    planned = planned_file_bytes(student.config, plan, text_source=text_source)
    assert report["file_bytes"] == planned
    records, read = read_tensor_records(path), gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in read.tensors}
    for layer, in_file, name in zip(LAYERS, IN_FILE, K_FORMATS, strict=True):
        record = records[f"blk.0.{in_file}.weight"]
        assert record.type_name == types[f"blk.0.{in_file}.weight"] == name
        source = f"model.layers.0.{layer}"
        order = row_order(student.config, f"{source}.weight")
        trained = student.get_submodule(source).fake_quantized_weight()
        expected = trained if order is None else trained[order]
        assert torch.equal(read_weight(path, record), expected)


def test_the_plugin_computes_what_was_trained(student, tmp_path, text_source):
    """Weights as the plugin's layers form them, to the bit."""
    from transformers import AutoModelForCausalLM

    import qat.export.plugin  # noqa: F401 makes the model type known

    plan = plan_of(student, PLAN).to_dict()
    export_to_hf_quantized(student, tmp_path / "a", text_source=text_source, plan=plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    for part, layer in quantized_layers(student).items():
        found = loaded.get_submodule(part).weight_on_grid()
        assert torch.equal(found, layer.fake_quantized_weight()), part


@pytest.mark.parametrize("export", [export_to_compressed_tensors, export_to_mlx])
def test_formats_of_simple_groups_refuse_the_grids(student, export, tmp_path, text_source):
    """By name, before anything is written."""
    with pytest.raises(ValueError, match="q_proj.*convert it first"):
        export(student, tmp_path / "a", text_source=text_source)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", others_later(K_FORMATS))
def test_rows_that_are_no_super_blocks_are_refused(name):
    """The message names the tensor, the rule and the remedy."""
    with pytest.raises(ValueError, match=r"down_proj.*128.*no multiple of the 256.*gguf:q4_0"):
        tiny_student("llama", f"linears=gguf:q4_0, *.down_proj=gguf:{name}")
