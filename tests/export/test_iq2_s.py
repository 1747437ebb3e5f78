"""Students on the vector grid of IQ2_S: every file holds what was trained, to the bit."""

import numpy as np
import pytest
import torch

from qat.export.gguf_file import read_tensor_records, read_weight
from qat.export.gguf_tensors import row_order
from qat.export.to_compressed_tensors import export_to_compressed_tensors
from qat.export.to_gguf import export_to_gguf
from qat.export.to_hf_quantized import export_to_hf_quantized
from qat.grids.blocks import pack_super_blocks, unpack_blocks
from qat.grids.scalar import snap_float16
from qat.model.surgery import quantized_layers, thaw_indices
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import FORMATS
from tests.tiny import plan_of, save_tiny, tiny_llama, tiny_student

gguf = pytest.importorskip("gguf")

PLAN = "linears=gguf:q4_0, *.down_proj=gguf:iq2_s, *.q_proj=gguf:iq2_s"
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
SPEC = FORMATS["gguf:iq2_s"]


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


def random_tensor(rows=8, inputs=512):
    """Return every part at random: all points, signs and integers."""
    parts = {
        "super_scale": snap_float16(torch.rand(rows, inputs // 256) + 1e-4),
        "sub_scale": torch.randint(16, (rows, inputs // 16)).float(),
    }
    indices = torch.randint(2**18, (rows, inputs // 8), dtype=torch.int32)
    return QuantizedTensor(SPEC, indices, parts)


def test_blocks_are_those_of_the_gguf_package():
    """82 bytes for 256 weights, dequantized by the package to the bit."""
    quantized = random_tensor()
    packed = pack_super_blocks(quantized.indices, quantized.parts, "iq2_s")
    assert packed.shape == (8, 2 * 82)
    found = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.IQ2_S)
    assert np.array_equal(found, quantized.dequantize().numpy())
    assert torch.equal(unpack_blocks(packed, "iq2_s"), quantized.dequantize())


def test_gguf_files_hold_what_was_trained(tmp_path, text_source):
    """Also from latent weights, and of q_proj, whose rows the runtime orders otherwise."""
    student = moved_student()
    report = export_to_gguf(student, tmp_path / "out.gguf", text_source=text_source)
    assert report["exact"] is True
    records = read_tensor_records(tmp_path / "out.gguf")
    for part, name in (("mlp.down_proj", "ffn_down"), ("self_attn.q_proj", "attn_q")):
        record = records[f"blk.1.{name}.weight"]
        assert record.type_name == "iq2_s"
        source = f"model.layers.1.{part}"
        order = row_order(student.config, f"{source}.weight")
        trained = student.get_submodule(source).fake_quantized_weight()
        found = read_weight(tmp_path / "out.gguf", record)
        assert torch.equal(found, trained if order is None else trained[order])
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == gguf.GGMLQuantizationType.IQ2_S


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
    with pytest.raises(ValueError, match=r"gguf:iq2_s.*convert it first"):
        export_to_compressed_tensors(moved_student(), tmp_path / "a", text_source=text_source)
    assert not (tmp_path / "a").exists()


def test_rows_that_are_no_super_blocks_are_refused():
    """The message names the tensor, the rule and the remedy."""
    with pytest.raises(ValueError, match=r"down_proj.*128.*no multiple of the 256.*gguf:q4_0"):
        tiny_student("llama", "linears=gguf:q4_0, *.down_proj=gguf:iq2_s")
