"""A GGUF file holds the trained student: every quantized bit, every key that runtimes read."""

import json

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qat.export import gguf_tensors
from qat.export.gguf_family import FAMILIES
from qat.export.gguf_file import read_tensor_records, read_weight
from qat.export.gguf_tensors import row_order
from qat.export.to_gguf import export_to_gguf
from qat.model.surgery import quantized_layers, thaw_indices
from tests.tiny import TINY_MODELS, quantize_plainly, tiny_llama, tiny_model, tiny_student

gguf = pytest.importorskip("gguf")

PLAIN = (
    "gguf:q4_0",
    "gguf:iq4_nl",
    "gguf:q8_0",
    "gguf:q5_0",
    "gguf:q5_1",
    "gguf:mxfp4",
)  # the gguf package's reader lacks Q2_0
MIXED = ("gguf:q2_0", "gguf:q2_0+gguf:q4_0", "deploy", "gguf:q4_0+gguf:q8_0")


def export(student, tmp_path, text_source, **options):
    return export_to_gguf(student, tmp_path / "out.gguf", text_source=text_source, **options)


def names_of(student):
    """Return file names of quantized weights by layer."""
    kind = gguf.MODEL_ARCH[FAMILIES[student.config.model_type].name]
    names = gguf.get_tensor_name_map(kind, 2)
    return {
        name: names.get_name(f"{name}.weight", (".weight",)) for name in quantized_layers(student)
    }


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("plan", [*PLAIN, *MIXED])
def test_quantized_weights_are_the_trained_ones(tmp_path, text_source, family, plan):
    """Also from latent weights; rows of llama's q and k come back from the runtime's order."""
    student = tiny_student(family, plan)
    for layer in list(quantized_layers(student).values())[::2]:
        thaw_indices(layer)
        layer.latent_weight.data += 0.02 * torch.randn_like(layer.latent_weight)
    report = export(student, tmp_path, text_source)
    records = read_tensor_records(tmp_path / "out.gguf")
    for name, file_name in names_of(student).items():
        found = read_weight(tmp_path / "out.gguf", records[file_name])
        order = row_order(student.config, f"{name}.weight")
        trained = student.get_submodule(name).fake_quantized_weight()
        assert torch.equal(found, trained if order is None else trained[order]), name
    assert report["exact"] is True
    assert report["tensors_compared"] == len(records)
    assert report == json.loads((tmp_path / "export.json").read_text())


def test_rows_of_llama_heads_are_interleaved():
    """The reference is the reshape of llama.cpp's converter, per head; qwen keeps its rows."""
    config = tiny_llama().config
    weight = np.arange(64)
    expected = weight.reshape(4, 2, 8).swapaxes(1, 2).reshape(-1)
    assert row_order(config, "model.layers.0.self_attn.q_proj.weight").tolist() == expected.tolist()
    half = np.arange(32).reshape(2, 2, 8).swapaxes(1, 2).reshape(-1)
    assert row_order(config, "model.layers.0.self_attn.k_proj.bias").tolist() == half.tolist()
    assert row_order(config, "model.layers.0.self_attn.v_proj.weight") is None
    config = TINY_MODELS["qwen3"]().config
    assert row_order(config, "model.layers.0.self_attn.q_proj.weight") is None


@pytest.mark.parametrize("head", ["f32", "f16", "bf16", "q8_0"])
def test_the_head_says_what_it_costs(tmp_path, text_source, head):
    """Signal to noise of embeddings, none where nothing is lost; the weights stay exact."""
    report = export(tiny_student("llama", "gguf:q4_0"), tmp_path, text_source, head=head)
    assert report["exact"] is True
    assert report["head"]["type"] == head
    expected = {"f32": None, "f16": 70, "bf16": 50, "q8_0": 40}[head]
    found = report["head"]["sqnr_db"]
    assert found is None if expected is None else found > expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_student_has_a_dense_reference(tmp_path, text_source, dtype):
    """Learned codebooks and low-rank scales, in the dtype asked for, biases of q and k in order."""
    student = tiny_student("llama", "q4a4_r4", attention_bias=True)
    for layer in quantized_layers(student).values():
        if layer.bias is not None:
            layer.bias.data = torch.randn(layer.bias.shape)
    report = export(student, tmp_path, text_source, dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    found = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    attention = student.model.layers[0].self_attn
    order = row_order(student.config, "model.layers.0.self_attn.q_proj.weight")
    weight = attention.q_proj.fake_quantized_weight().to(dtype)[order]
    assert torch.equal(found["blk.0.attn_q.weight"].view(dtype), weight)
    assert torch.equal(found["blk.0.attn_q.bias"], attention.q_proj.bias[order])
    assert (report["tensors_rounded"] > 0) == (dtype != torch.float32)


def test_a_folder_gets_model_gguf(tmp_path, text_source):
    """Where the output does not end in .gguf."""
    report = export_to_gguf(
        tiny_student("llama", "gguf:q4_0"), tmp_path / "folder", text_source=text_source
    )
    assert report["file"] == "model.gguf"
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {"model.gguf", "export.json"}
    assert report["file_bytes"] == (tmp_path / "folder" / "model.gguf").stat().st_size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_embeddings_and_offsets_are_the_trained_ones(tmp_path, text_source, family, tied):
    """A quantized table goes out as its own blocks; a tied head has no tensor of its own."""
    plan = "all=gguf:q4_1, mlp=gguf:q4_0, embed=gguf:q8_0"
    student = tiny_student(family, plan, tied=tied)
    assert export(student, tmp_path, text_source)["exact"] is True
    records = read_tensor_records(tmp_path / "out.gguf")
    assert records["token_embd.weight"].type_name == "q8_0"
    assert ("output.weight" in records) != tied
    for name, file_name in names_of(student).items():
        found = read_weight(tmp_path / "out.gguf", records[file_name])
        order = row_order(student.config, f"{name}.weight")
        trained = student.get_submodule(name).fake_quantized_weight()
        assert torch.equal(found, trained if order is None else trained[order]), name


def test_qwen2_has_biases_and_its_own_name(tmp_path, text_source):
    """Rows stay; q, k, v biases are written in f32."""
    config = Qwen2Config(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    student = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    quantize_plainly(student, "gguf:q2_0+gguf:q4_0")
    assert export(student, tmp_path, text_source)["exact"]
    records = read_tensor_records(tmp_path / "out.gguf")
    assert records["blk.0.attn_q.bias"].type_name == "f32"
    assert records["blk.0.ffn_down.weight"].type_name == "q2_0"


def refused(student, tmp_path, text_source, match, **options):
    """Check that an export is refused with a message and that it wrote nothing."""
    with pytest.raises(ValueError, match=match):
        export(student, tmp_path, text_source, **options)
    assert not list(tmp_path.iterdir())


def test_what_has_no_place_is_refused_before_anything_is_written(tmp_path, text_source):
    """Each message names the layer or key, the value and the remedy."""
    refused(tiny_model("cohere"), tmp_path, text_source, "no tensor map.*llama", dtype=torch.half)
    learned = (
        r"model.layers.0.self_attn.q_proj.* no grid of GGUF \(lut4-g32\).*qat convert --plan gguf"
    )
    refused(tiny_student(), tmp_path, text_source, learned)
    refused(tiny_llama(), tmp_path, text_source, "no quantized layer; give --dtype")
    student = tiny_student("llama", "gguf:q4_0")
    layer = student.model.layers[1].mlp.up_proj
    layer.scale.data[0, 0] = 1e6
    refused(student, tmp_path, text_source, r"layers\.1\.mlp\.up_proj.*outside float16.*lower rate")
    student = tiny_student("llama", "gguf:q4_0")
    student.model.layers[0].mlp.up_proj.codebook.data[0] -= 0.5
    refused(student, tmp_path, text_source, r"up_proj.weight: its codebook was trained away")
    student = tiny_student("llama", "gguf:q4_0")
    student.model.embed_tokens.weight.data[0, 0] = 1e6
    refused(student, tmp_path, text_source, r"embed_tokens.*--head bf16")
    student = tiny_student("llama", "gguf:q4_0")
    student.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4}
    refused(student, tmp_path, text_source, "rope type dynamic")


def test_a_report_that_is_none_of_ours_is_not_overwritten(tmp_path, text_source):
    """`export.json` of another program next to the file to be."""
    (tmp_path / "export.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="is no export's report"):
        export(tiny_student("llama", "gguf:q4_0"), tmp_path, text_source)
    assert [file.name for file in tmp_path.iterdir()] == ["export.json"]


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight"])
def test_a_changed_bit_fails_the_export(tmp_path, text_source, monkeypatch, name):
    """In blocks or in a dense tensor; nothing is left behind."""
    honest = gguf_tensors.read_bytes

    def damaged(path, record, rows):
        data = honest(path, record, rows)
        if record == read_tensor_records(path)[name]:
            data[0, 5] ^= 1
        return data

    monkeypatch.setattr(gguf_tensors, "read_bytes", damaged)
    refused(tiny_student("llama", "gguf:q4_0"), tmp_path, text_source, "reads back otherwise")
