"""Packed folders load in transformers with the plugin, and only with it."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.export.to_hf_quantized import export_to_hf_quantized
from qat.model.surgery import quantized_layers
from tests.tiny import moved_student, plan_of, tiny_student

TOKEN_IDS = torch.arange(12).view(2, 6)


ANY_PLANS = ("q2a4", "q4a4_r4", "q3a5", "deploy", "gguf:iq4_nl", "coreml:lut2+coreml:lut4")


EMBEDDED = (
    ("llama", "q2a4, embed=int4-g32"),
    ("qwen3", "all=affine4-g64"),
    ("gemma", "q2a4, embed=lut4-g32"),
)


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("family", "plan"),
    [*(("llama", plan) for plan in ANY_PLANS), ("qwen3", "q2a4"), ("gemma", "deploy"), *EMBEDDED],
)
def test_packed_folders_load_as_the_student(tmp_path, text_source, family, plan):
    """Any plan; logits to the bit in float32, and weights to the bit whatever the dtype."""
    from transformers import AutoModelForCausalLM

    import qat.export.plugin  # noqa: F401 makes the model type known

    student = moved_student(family, plan, tied=family != "qwen3", attention_bias=True)
    expected = student(TOKEN_IDS).logits
    export_to_hf_quantized(
        student, tmp_path / "a", text_source=text_source, plan=plan_of(student, plan).to_dict()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.equal(model(TOKEN_IDS).logits, expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    for name, layer in quantized_layers(student).items():
        found = half.get_submodule(name).weight_on_grid()
        assert torch.equal(found, layer.fake_quantized_weight()), name
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "b")


def export_packed(tmp_path, text_source):
    student = tiny_student("llama", "deploy")
    plan = plan_of(student, "deploy").to_dict()
    export_to_hf_quantized(student, tmp_path / "a", text_source=text_source, plan=plan)
    return tmp_path / "a"


@pytest.mark.recipe
def test_without_the_plugin_nothing_loads(tmp_path, text_source):
    """No model of random weights: an error that names the import. The tokenizer still loads."""
    folder = export_packed(tmp_path, text_source)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        f"T.from_pretrained({str(folder)!r})\n"
        f"try: A.from_pretrained({str(folder)!r})\n"
        "except ValueError as error: print(error)\n"
        "else: print('loaded')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "import qat.export.plugin first" in done.stdout


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path, text_source):
    """transformers would warn and fill it at random."""
    from transformers import AutoModelForCausalLM

    import qat.export.plugin  # noqa: F401 makes the model type known

    file = export_packed(tmp_path, text_source) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.scale is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
