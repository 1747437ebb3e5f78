"""Folders of packed layers: each format's entries stand for the trained weight, to the bit."""

import pytest
import torch

from qat.export import model_folder
from qat.export.model_folder import lossless_dtype
from qat.export.to_compressed_tensors import export_to_compressed_tensors
from qat.export.to_mlx import export_to_mlx
from tests.tiny import tiny_llama, tiny_student

TOKEN_IDS = torch.arange(12).view(2, 6)
INTEGER_PLANS = ("deploy", "w4a16-g32", "gguf:q2_0+gguf:q4_0", "mlx-4bit-g32", "gguf:q8_0")


EXPORTERS = {"compressed-tensors": export_to_compressed_tensors, "mlx": export_to_mlx}


@pytest.mark.parametrize("target", EXPORTERS)
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("q2a4", "q_proj is lut4-g32, the format holds integers.*qat convert --plan deploy"),
        ("gguf:iq4_nl", "q_proj is gguf:iq4_nl, the format holds integers"),
        ("q7a7_int", "q_proj has 7 bits, the format"),
        ("q4a4_r4", "q_proj is lut4-r4, the format holds integers"),
    ],
)
def test_other_grids_are_refused_before_anything_is_written(
    tmp_path, text_source, target, plan, message
):
    """The layer, the value and the remedy."""
    with pytest.raises(ValueError, match=message):
        EXPORTERS[target](tiny_student("llama", plan), tmp_path / "a", text_source=text_source)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", EXPORTERS)
def test_values_off_the_grid_are_refused(tmp_path, text_source, target):
    """A scale beyond float16, a codebook that moved, a model that is no student."""
    student = tiny_student("llama", "gguf:q4_0")
    student.model.layers[0].mlp.up_proj.scale.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"up_proj: scale .* is outside float16"):
        EXPORTERS[target](student, tmp_path / "a", text_source=text_source)
    student = tiny_student("llama", "gguf:q4_0")
    student.model.layers[0].mlp.up_proj.codebook.data[3] += 0.5
    with pytest.raises(ValueError, match="up_proj: its codebook was trained away"):
        EXPORTERS[target](student, tmp_path / "a", text_source=text_source)
    with pytest.raises(ValueError, match="no quantized layer"):
        EXPORTERS[target](tiny_llama(), tmp_path / "a", text_source=text_source)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", EXPORTERS)
def test_a_changed_bit_fails_the_export(tmp_path, text_source, monkeypatch, target):
    """Of a packed layer or of a dense part; nothing is left under the final name."""
    honest = model_folder.read_tensors
    packed = "weight_packed" if target == "compressed-tensors" else "weight"
    for key in (f"model.layers.1.mlp.down_proj.{packed}", "model.norm.weight"):

        def damaged(folder, key=key):
            tensors = honest(folder)
            tensors[key].view(torch.uint8)[0] ^= 1
            return tensors

        monkeypatch.setattr(model_folder, "read_tensors", damaged)
        with pytest.raises(ValueError, match="reads back otherwise"):
            EXPORTERS[target](
                tiny_student("llama", "gguf:q4_0"), tmp_path / "a", text_source=text_source
            )
        assert not list(tmp_path.iterdir())


def test_the_smallest_dtype_that_loses_nothing():
    """bfloat16 before float16 before float32."""
    values = torch.randn(9)
    assert lossless_dtype([values.bfloat16().float()]) == torch.bfloat16
    assert lossless_dtype([values.half().float()]) == torch.float16
    assert lossless_dtype([values.half().float(), values]) == torch.float32
