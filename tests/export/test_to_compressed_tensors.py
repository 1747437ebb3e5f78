"""What compressed-tensors reads stands for the trained weight, to the bit."""

import json
import re

import pytest
import torch

from qat.export.model_folder import read_tensors
from qat.export.to_compressed_tensors import distinct_ends, export_to_compressed_tensors
from qat.model.surgery import quantized_layers
from tests.tiny import moved_student, tiny_student, unpack_words

INTEGER_PLANS = ("deploy", "w4a16-g32", "gguf:q2_0+gguf:q4_0", "mlx-4bit-g32", "gguf:q8_0")


@pytest.mark.parametrize("plan", INTEGER_PLANS)
def test_compressed_tensors_entries_by_definition(tmp_path, text_source, plan):
    """weight = (code - 2**(bits-1)) * scale, codes dense in int32 words, the config says it."""
    student = moved_student(plan=plan)
    report = export_to_compressed_tensors(student, tmp_path / "a", text_source=text_source)
    stored = read_tensors(tmp_path / "a")
    for name, layer in quantized_layers(student).items():
        bits = layer.spec.bits
        words, scale, shape = (stored[f"{name}.weight_{p}"] for p in ("packed", "scale", "shape"))
        assert words.dtype == torch.int32
        assert shape.tolist() == [layer.out_features, layer.in_features]
        codes = unpack_words(words, bits, layer.in_features) - 2 ** (bits - 1)
        scale = scale.double().repeat_interleave(layer.spec.group_size, dim=1)
        assert torch.equal((codes * scale).float(), layer.fake_quantized_weight()), name
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    plans = [layer.spec for layer in quantized_layers(student).values()]
    grids = {(plan.bits, plan.group_size) for plan in plans}
    groups = config["config_groups"].values()
    assert {(g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups} == grids
    assert report["exact"] is True
    assert report["tensors_rounded"] == 0


def test_compressed_tensors_has_no_embedding_and_no_offset(tmp_path, text_source):
    """Loaders of that format keep tables dense; each refusal names what to do instead."""
    for plan, message in (
        ("deploy, embed=int4-g32", "embed_tokens is a quantized embedding.*qat convert"),
        ("mlx:4bit-g64", "is mlx:4bit-g64, the format holds integers.*qat convert"),
    ):
        student = tiny_student("llama", plan)
        with pytest.raises(ValueError, match=message):
            export_to_compressed_tensors(student, tmp_path / "a", text_source=text_source)
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_rounds_scales_is_refused(tmp_path, text_source):
    """Loaders cast scales to the folder's dtype; the deploy pair's fit both 16-bit ones."""
    student = tiny_student("llama", "gguf:q4_0")
    with pytest.raises(ValueError, match="rounds the scales.*w2a16-g64"):
        export_to_compressed_tensors(
            student, tmp_path / "a", text_source=text_source, dtype=torch.bfloat16
        )
    for dtype in (torch.bfloat16, torch.float16):
        report = export_to_compressed_tensors(
            tiny_student("llama", "deploy"),
            tmp_path / str(dtype),
            text_source=text_source,
            dtype=dtype,
        )
        assert report["exact"] is True
        assert report["tensors_rounded"] > 0  # dense parts


def test_ends_tell_layers_of_one_name_apart():
    """Where layers of one last name are on several grids, patterns name their numbers."""
    names = [f"model.layers.{n}.mlp.{last}" for n in range(12) for last in ("up_proj", "down_proj")]
    coarse = [name for name in names if "up_proj" in name or name.split(".")[2] in ("1", "10")]
    fine = [name for name in names if name not in coarse]
    for chosen, others in ((coarse, fine), (fine, coarse)):
        pattern = re.compile(rf".*\.({'|'.join(distinct_ends(chosen, others))})$")
        assert [name for name in names if pattern.match(name)] == chosen
