"""A dense export is the student: every bit, every logit, without this package."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.cli.commands import main
from qat.export import to_hf
from qat.export.to_hf import export_to_hf
from qat.model.surgery import quantized_layers, thaw_indices
from tests.tiny import (
    FAMILY_TIED,
    save_student,
    save_tiny,
    tiny_llama,
    tiny_student,
    tiny_tokenizer,
)

TOKEN_IDS = torch.arange(12).view(2, 6)


def export(student, tmp_path, text_source, dtype=torch.float32):
    return export_to_hf(student, tmp_path / "out", text_source=text_source, dtype=dtype)


@pytest.mark.parametrize(("family", "tied"), FAMILY_TIED)
def test_logits_are_the_students(tmp_path, text_source, family, tied):
    """Plain transformers gives the student's logits to the bit; a tied head stays one tensor."""
    student = tiny_student(family, tied=tied)
    expected = student(TOKEN_IDS).logits
    report = export(student, tmp_path, text_source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model(TOKEN_IDS).logits, expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tied
    assert report == json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["exact"] is True
    assert report["tensors_rounded"] == 0
    assert report["tensors_compared"] == len(model.state_dict())


@pytest.mark.parametrize("plan", ["q2a4", "q4a4_r4"])
def test_weights_are_the_fake_quantized_ones(tmp_path, text_source, plan):
    """Group scales, low-rank scales and latent weights: the file holds what the forward uses."""
    student = tiny_student(plan=plan, attention_bias=True)
    layers = quantized_layers(student)
    generator = torch.Generator().manual_seed(1)
    for layer in list(layers.values())[::2]:
        if not layer.spec.rank:
            thaw_indices(layer)
            layer.latent_weight.data += 0.01 * torch.randn(
                layer.latent_weight.shape, generator=generator
            )
    expected = {name: layer.fake_quantized_weight().detach() for name, layer in layers.items()}
    biases = {name: layer.bias for name, layer in layers.items() if layer.bias is not None}
    export(student, tmp_path, text_source)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[f"{name}.weight"], weight) for name, weight in expected.items())
    assert biases
    assert all(torch.equal(written[f"{name}.bias"], bias) for name, bias in biases.items())


def test_a_smaller_dtype_says_how_much_it_rounds(tmp_path, text_source):
    """In bfloat16 the file is exact to what was asked, and counts the tensors that lost bits."""
    student = tiny_student()
    expected = next(iter(quantized_layers(student).values())).fake_quantized_weight()
    report = export(student, tmp_path, text_source, torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = next(name for name in written if name.endswith("q_proj.weight"))
    assert torch.equal(written[name], expected.bfloat16())
    assert report["tensors_rounded"] > 0


def test_a_value_beyond_the_dtype_is_refused(tmp_path, text_source):
    """Nothing is written; the message names the tensor."""
    student = tiny_student()
    student.model.norm.weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*--dtype fp32"):
        export(student, tmp_path, text_source, torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_changed_bit_fails_the_export(tmp_path, text_source, monkeypatch):
    """What reads back otherwise is never left under the final name."""
    copy = to_hf.add_text_files

    def damage(source, target):
        copy(source, target)
        tensors = load_file(target / "model.safetensors")
        weight = tensors["model.layers.1.mlp.down_proj.weight"]
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(to_hf, "add_text_files", damage)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight reads back"):
        export(tiny_student(), tmp_path, text_source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "tied"), FAMILY_TIED)
def test_quantized_embeddings_become_dense_tables(tmp_path, text_source, family, tied):
    """Plain transformers computes the student's logits, tied heads stay tied."""
    student = tiny_student(family, "q2a4, embed=affine4-g64", tied=tied)
    ids = torch.arange(12).view(2, 6)
    expected = student(ids).logits
    export_to_hf(student, tmp_path / "out", text_source=text_source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model(ids).logits, expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def write_native(folder, text_source):
    return save_student(folder, tiny_student(), text_source)


def test_the_command_makes_a_folder_that_needs_nothing_else(tmp_path, capsys):
    """Tokenizer and chat template travel along, and still load when the source is gone."""
    base = save_tiny(tmp_path / "base", tiny_llama())
    native = write_native(tmp_path / "student", base)
    shutil.rmtree(base)
    flags = ["--checkpoint", str(native), "--to", "hf", "--output", str(tmp_path / "out")]
    assert main("export", flags) == 0
    closing = json.loads(capsys.readouterr().out)
    assert closing["exact"] is True
    assert closing["path"] == str(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_the_command_refuses_what_it_cannot_do(tmp_path, text_source, capsys):
    """An output that exists, and a checkpoint that is no student, each in one line."""
    (tmp_path / "out").mkdir()
    flags = ["--checkpoint", str(text_source), "--to", "hf", "--output"]
    assert main("export", [*flags, str(tmp_path / "out")]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert main("export", [*flags, str(tmp_path / "other")]) == 2
    assert "no quantized layer" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
