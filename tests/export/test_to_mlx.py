"""What a folder for mlx-lm holds stands for the trained weight, to the bit."""

import json

import numpy as np
import pytest
import torch

from qat.export.model_folder import read_tensors
from qat.export.to_mlx import export_to_mlx, is_exact_in_float16
from qat.model.surgery import quantized_layers
from tests.tiny import moved_student, tiny_student, unpack_words

INTEGER_PLANS = ("deploy", "w4a16-g32", "gguf:q2_0+gguf:q4_0", "mlx-4bit-g32", "gguf:q8_0")


@pytest.mark.parametrize("plan", INTEGER_PLANS)
def test_mlx_entries_by_definition(tmp_path, text_source, plan):
    """weight = code * scale + bias in the entries' own dtype; other grids are named by layer."""
    student = moved_student(plan=plan)
    export_to_mlx(student, tmp_path / "a", text_source=text_source)
    stored = read_tensors(tmp_path / "a")
    block = json.loads((tmp_path / "a" / "config.json").read_text())["quantization"]
    for name, layer in quantized_layers(student).items():
        said = block.get(name, block)
        assert (said["bits"], said["group_size"]) == (layer.spec.bits, layer.spec.group_size)
        codes = unpack_words(stored[f"{name}.weight"], said["bits"], layer.in_features)
        scale, bias = (
            stored[f"{name}.{part}"].numpy().repeat(said["group_size"], axis=1)
            for part in ("scales", "biases")
        )
        found = codes.numpy().astype(scale.dtype) * scale + bias
        assert found.dtype == scale.dtype
        trained = layer.fake_quantized_weight()
        assert torch.equal(torch.from_numpy(found.astype(np.float32)), trained), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("plan", ["all=mlx:4bit-g64", "mlx:3bit-g32, embed=mlx:8bit-g64"])
def test_mlx_holds_offsets_and_embeddings(tmp_path, text_source, plan, tied):
    """weight = code * scale + bias in the entries' dtype, to the bit of training."""
    student = moved_student(plan=plan, tied=tied)
    report = export_to_mlx(student, tmp_path / "a", text_source=text_source)
    assert report["exact"] is True
    stored = read_tensors(tmp_path / "a")
    assert any(name.startswith("lm_head") for name in stored) != tied
    dtypes = {stored[f"{n}.scales"].dtype: n for n in quantized_layers(student)}
    assert dtypes.keys() == {torch.float16} | ({torch.float32} if "8bit" in plan else set())
    for name, layer in quantized_layers(student).items():
        codes = unpack_words(stored[f"{name}.weight"], layer.spec.bits, layer.in_features)
        scale, bias = (
            stored[f"{name}.{part}"].numpy().repeat(layer.spec.group_size, axis=1)
            for part in ("scales", "biases")
        )
        found = codes.numpy().astype(scale.dtype) * scale + bias
        trained = layer.fake_quantized_weight()
        assert torch.equal(torch.from_numpy(found.astype(np.float32)), trained), name


def test_mlx_is_told_how_positions_turn_heads(tmp_path, text_source):
    """mlx-lm reads rope_theta at the top of config.json and takes 10000 where it is absent."""
    student = tiny_student("llama", "deploy")
    student.config.rope_parameters = {"rope_type": "default", "rope_theta": 123456.0}
    export_to_mlx(student, tmp_path / "a", text_source=text_source)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["rope_theta"] == 123456.0
    assert config["rope_scaling"] is None
    student.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    export_to_mlx(student, tmp_path / "b", text_source=text_source)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_mlx_scales_are_float16_only_where_no_step_rounds():
    """Two bits times a bfloat16 number do not; four bits, or all of float16's bits, do."""
    scale = torch.randn(64, 4)
    both, single = scale.bfloat16().half().float(), scale.half().float()
    assert is_exact_in_float16(both, -2 * both, 2)
    assert not is_exact_in_float16(both, -8 * both, 4)
    assert not is_exact_in_float16(single, -2 * single, 2)
