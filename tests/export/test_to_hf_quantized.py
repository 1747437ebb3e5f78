"""Packed parts hold a layer to the bit, in as many bytes as its format has."""

import pytest
import torch

from qat.export.to_hf_quantized import export_to_hf_quantized, packed_parts, read_weight
from qat.model.surgery import quantized_layers
from tests.tiny import moved_student, plan_of, tiny_llama, tiny_student

PLANS = ("q2a4", "q4a4_r4", "q3a5", "deploy", "q2a4_int_g32", "q2a4, embed=lut4-g32")


@pytest.mark.parametrize("plan", PLANS)
def test_packed_parts_read_back_as_the_trained_weight(plan):
    """Also from latent weights; what files hold of it is what a plan counts."""
    for name, layer in quantized_layers(moved_student(plan=plan)).items():
        parts = packed_parts(layer)
        with torch.no_grad():
            assert torch.equal(read_weight(layer, parts), layer.fake_quantized_weight()), name
        counted = layer.spec.size_bytes((layer.out_features, layer.in_features))
        held = sum(part.nbytes for part in parts.values())
        fixed = 0 if layer.spec.grid.is_learned else parts["codebook"].nbytes
        assert held == counted + fixed


def test_what_is_no_student_is_refused(tmp_path):
    """Nor one with a scale that float16 does not hold; nothing is written."""
    student = tiny_student()
    plan = plan_of(student).to_dict()
    with pytest.raises(ValueError, match="no quantized layer"):
        export_to_hf_quantized(tiny_llama(), tmp_path / "a", text_source=tmp_path, plan=plan)
    student.model.layers[1].mlp.up_proj.scale.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: scale .* outside float16"):
        export_to_hf_quantized(student, tmp_path / "a", text_source=tmp_path, plan=plan)
    assert list(tmp_path.iterdir()) == []
