"""What an allocation may choose among."""

from qat.export.to_gguf import require_type
from qat.model.surgery import model_tensors
from qat.quant.spec import TensorSpec
from qat.quant.targets import CANDIDATES, candidates, tied_groups
from tests.tiny import tiny_llama


def test_every_candidate_has_a_name_and_fits_its_target():
    """Names are of this version; those of GGUF have a type there."""
    for names in CANDIDATES.values():
        assert len(set(names)) == len(names)
        for name in names:
            TensorSpec.from_name(name)
    for name in CANDIDATES["gguf"]:
        assert require_type("x", TensorSpec.from_name(name))


def test_rows_decide_and_16_bits_are_always_there():
    """Formats of longer blocks than a row are left out; embeddings stay dense where they must."""
    tensors = model_tensors(tiny_llama())
    found = candidates("gguf", tensors)
    up = {spec.name for spec in found["model.layers.0.mlp.up_proj.weight"]}
    assert {"gguf:q4_0", "gguf:q2_0", "f16"} <= up
    assert "gguf:iq2_s" not in up  # rows of 64
    dense = candidates("compressed-tensors", tensors)["model.embed_tokens.weight"]
    assert [spec.name for spec in dense] == ["f16"]
    assert "model.norm.weight" not in found


def test_joined_linears_share_a_format_where_runtimes_join_them():
    """q, k and v, gate and up are one matrix each in vLLM."""
    names = list(candidates("compressed-tensors", model_tensors(tiny_llama())))
    groups = {
        frozenset(n.split(".")[-2] for n in g) for g in tied_groups("compressed-tensors", names)
    }
    assert {"q_proj", "k_proj", "v_proj"} in groups
    assert {"gate_proj", "up_proj"} in groups
    assert all(len(group) == 1 for group in tied_groups("gguf", names))
