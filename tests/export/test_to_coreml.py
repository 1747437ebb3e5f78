"""Palettes against the weights of training, and what they cannot hold; packages: tests/parity."""

import numpy as np
import pytest
import torch

from qat.export import to_coreml
from qat.export.to_coreml import export_to_coreml, read_weight, require_palette
from qat.model.surgery import current_indices, quantized_layers, stored_parts
from tests.tiny import moved_student, tiny_student

GATE = "model.layers.0.mlp.gate_proj"


def constants_of(name, layer):
    """Return what a package of one layer holds in float32, by the names of its operations."""
    codebook = stored_parts(layer)["codebook"].detach().float()
    palette = (current_indices(layer).numpy(), codebook.numpy().reshape(1, 1, -1, 1))
    found = {f"{name}_palette": palette}
    if not layer.spec.rank:
        return found | {f"{name}_weight": layer.full_scale().detach().numpy()}
    a, magnitude, b = (layer.stored(getattr(layer, n).detach()) for n in to_coreml.FACTORS)
    for rank in range(layer.spec.rank):
        found[f"{name}_a{rank}"] = a[:, rank][None].numpy()
        found[f"{name}_b{rank}"] = b[rank][None].numpy()
        found[f"{name}_g{rank}"] = np.float32(magnitude[rank])
    return found


@pytest.mark.parametrize("plan", ["q2a4", "q4a4_r4", "q4_g0"])
def test_constants_are_the_trained_weights(plan):
    """Scales per group and per row, low-rank factors: to the bit, also from latent weights."""
    for name, layer in quantized_layers(moved_student(plan=plan)).items():
        prefix = to_coreml.file_name(name)
        with torch.no_grad():
            found = read_weight(constants_of(prefix, layer), prefix, layer)
            assert torch.equal(found, layer.fake_quantized_weight()), name


@pytest.mark.parametrize(
    ("plan", "name", "dtype", "message"),
    [
        ("q2a4", GATE, torch.bfloat16, "no bfloat16; use --dtype fp16"),
        ("gguf:mxfp4", GATE, torch.float16, r"gate_proj is gguf:mxfp4.*export --to"),
        ("all=affine4-g64", GATE, torch.float16, "one float16 scale; export --to gguf"),
        ("q5a4", GATE, torch.float16, r"palettes have 2\*\*bits values"),
        ("q2a4, embed=int4-g32", "model.embed_tokens", torch.float16, "holds linears only"),
    ],
)
def test_what_a_palette_cannot_hold_is_refused(plan, name, dtype, message):
    """By the layer's name, with the remedy."""
    layer = quantized_layers(tiny_student("llama", plan))[name]
    with pytest.raises(ValueError, match=message):
        require_palette(name, layer, dtype)


def test_refusals_write_nothing(tmp_path, monkeypatch):
    """A missing library first, then a scale that float16 does not hold."""
    student = tiny_student()
    with monkeypatch.context() as patch:
        patch.setattr(to_coreml, "find_spec", lambda _name: None)
        with pytest.raises(ValueError, match="pip install coremltools"):
            export_to_coreml(student, tmp_path / "a", text_source=tmp_path)
    monkeypatch.setattr(to_coreml, "find_spec", lambda name: name)
    student.get_submodule(GATE).scale.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="outside float16"):
        export_to_coreml(student, tmp_path / "a", text_source=tmp_path)
    assert list(tmp_path.iterdir()) == []
