"""A student of many GGUF formats at once: every file holds what was trained, to the bit."""

import pytest
import torch

from qat.export.gguf_file import read_tensor_records, read_weight
from qat.export.gguf_size import planned_file_bytes
from qat.export.gguf_tensors import row_order
from qat.export.to_gguf import export_to_gguf
from qat.export.to_hf_quantized import export_to_hf_quantized
from qat.model.checkpoint import read_checkpoint, student_tensors
from qat.model.surgery import keep_scales_storable, quantized_layers, thaw_indices
from tests.tiny import plan_of, save_student, save_tiny, tiny_llama, tiny_student

FORMATS = {
    "q_proj": "tq2_0",
    "o_proj": "q5_1",
    "gate_proj": "q5_0",
    "up_proj": "mxfp4",
    "down_proj": "tq1_0",
}
PLAN = "linears=gguf:q4_0, " + ", ".join(f"*.{p}=gguf:{name}" for p, name in FORMATS.items())
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}


@pytest.fixture(scope="module")
def text_source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), tiny_llama())


@pytest.fixture(scope="module")
def student():
    """Return a student whose scales moved, and half of whose layers follow latent weights."""
    made = tiny_student("llama", PLAN, **SIZES)
    for index, layer in enumerate(quantized_layers(made).values()):
        if index % 2:
            thaw_indices(layer)
            layer.latent_weight.data += 0.02 * torch.randn_like(layer.latent_weight)
        layer.scale.data *= torch.randn_like(layer.scale).mul(0.5).exp()
        layer.scale.data[0, 0] = 0.0
    made.requires_grad_()
    keep_scales_storable(quantized_layers(made).values())
    made.requires_grad_(requires_grad=False)
    return made


def test_gguf_files_hold_what_was_trained(tmp_path, text_source, student):
    """Each in its type, and of the bytes that the plan says."""
    path = tmp_path / "out.gguf"
    assert export_to_gguf(student, path, text_source=text_source)["exact"] is True
    records = read_tensor_records(path)
    assert {r.type_name for r in records.values()} == {*FORMATS.values(), "q4_0", "f32", "f16"}
    for part, name in (("mlp.up_proj", "ffn_up"), ("self_attn.q_proj", "attn_q")):
        source = f"model.layers.1.{part}"
        trained = student.get_submodule(source).fake_quantized_weight()
        order = row_order(student.config, f"{source}.weight")
        found = read_weight(path, records[f"blk.1.{name}.weight"])
        assert torch.equal(found, trained if order is None else trained[order])
    plan = plan_of(student, f"{PLAN}, embed=f16")
    assert planned_file_bytes(student.config, plan, text_source=text_source) == path.stat().st_size


def test_checkpoints_hold_what_trains(tmp_path, text_source, student):
    """The same weights; exponents in a byte each."""
    up = "model.layers.0.mlp.up_proj"
    stored = student_tensors(student)
    assert stored[f"{up}.scale"].dtype == torch.uint8
    sizes = [stored[f"{up}.{part}"].nbytes for part in ("indices", "scale")]
    assert sum(sizes) == student.get_submodule(up).spec.size_bytes((256, 256)) == 256 * 8 * 17
    save_student(tmp_path / "student", student, text_source, PLAN)
    found, _ = read_checkpoint(tmp_path / "student")
    for name, layer in quantized_layers(student).items():
        read = found.get_submodule(name)
        assert torch.equal(read.fake_quantized_weight(), layer.fake_quantized_weight()), name


def test_the_plugin_computes_what_was_trained(tmp_path, text_source, student):
    """Weights as its layers form them, to the bit."""
    from transformers import AutoModelForCausalLM

    import qat.export.plugin  # noqa: F401 makes the model type known

    plan = plan_of(student, PLAN).to_dict()
    export_to_hf_quantized(student, tmp_path / "a", text_source=text_source, plan=plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    for name, layer in quantized_layers(student).items():
        found = loaded.get_submodule(name).weight_on_grid()
        assert torch.equal(found, layer.fake_quantized_weight()), name


def test_scales_of_powers_of_two_train_straight_through(student):
    """Forward the nearest power, backward the gradient of a plain scale at that power."""
    layer = student.get_submodule("model.layers.0.mlp.up_proj")
    scale, _ = layer.expand()
    assert torch.equal(scale.log2(), scale.log2().round())
    assert not torch.equal(scale, layer.scale)
    arriving = torch.randn(256, 256)
    layer.scale.requires_grad_().grad = None
    layer.fake_quantized_weight().backward(arriving)
    plain = scale.detach().clone().requires_grad_()
    values = layer.fake_quantized_weight().detach().view(256, 8, 32) / plain.detach()[..., None]
    latent = layer.latent_weight
    if latent is not None:
        normalized = latent.detach().view_as(values) / plain.detach()[..., None]
        values = values - normalized.where(normalized.abs() <= 7, torch.zeros(()))
    expected = (arriving.view_as(values) * values).sum(-1)
    assert torch.allclose(layer.scale.grad, expected, rtol=1e-4, atol=1e-4)
