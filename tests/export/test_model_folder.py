"""Folders of packed layers: each format's entries stand for the trained weight, to the bit."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.export import model_folder
from qat.export.model_folder import lossless_dtype, read_tensors
from qat.export.to_compressed_tensors import export_to_compressed_tensors
from qat.export.to_hf_quantized import export_to_hf_quantized
from qat.export.to_mlx import export_to_mlx, is_exact_in_float16
from qat.model.surgery import quantized_layers, thaw_indices
from tests.tiny import plan_of, save_tiny, tiny_llama, tiny_student

TOKEN_IDS = torch.arange(12).view(2, 6)
INTEGER_PLANS = ("deploy", "w4a16-g32", "gguf:q2_0+gguf:q4_0", "mlx-4bit-g32", "gguf:q8_0")
ANY_PLANS = ("q2a4", "q4a4_r4", "q3a5", "deploy", "gguf:iq4_nl", "coreml:lut2+coreml:lut4")

EMBEDDED = (
    ("llama", "q2a4, embed=int4-g32"),
    ("qwen3", "all=affine4-g64"),
    ("gemma", "q2a4, embed=lut4-g32"),
)


@pytest.fixture(scope="module")
def text_source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), tiny_llama())


def moved_student(family="llama", plan="deploy", **changes):
    """Return a student whose indices follow latent weights that training moved."""
    student = tiny_student(family, plan, **changes)
    for layer in list(quantized_layers(student).values())[::2]:
        if not layer.spec.rank:
            thaw_indices(layer)
            layer.latent_weight.data += 0.02 * torch.randn_like(layer.latent_weight)
    return student


def unpacked(words, bits, num_inputs):
    """Return the unsigned codes of 32-bit words, one at a time."""
    rows = []
    for row in words.view(torch.int32).numpy().view(np.uint32).tolist():
        stream = sum(word << (32 * place) for place, word in enumerate(row))
        rows.append([(stream >> (bits * j)) & (2**bits - 1) for j in range(num_inputs)])
    return torch.tensor(rows)


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
        codes = unpacked(words, bits, layer.in_features) - 2 ** (bits - 1)
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
        codes = unpacked(stored[f"{name}.weight"], said["bits"], layer.in_features)
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
    for name, layer in quantized_layers(student).items():
        codes = unpacked(stored[f"{name}.weight"], layer.spec.bits, layer.in_features)
        scale, bias = (
            stored[f"{name}.{part}"].numpy().repeat(layer.spec.group_size, axis=1)
            for part in ("scales", "biases")
        )
        found = codes.numpy().astype(scale.dtype) * scale + bias
        trained = layer.fake_quantized_weight()
        assert torch.equal(torch.from_numpy(found.astype(np.float32)), trained), name


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


@pytest.mark.parametrize(
    ("family", "plan"),
    [*(("llama", plan) for plan in ANY_PLANS), ("qwen3", "q2a4"), ("gemma", "deploy"), *EMBEDDED],
)
def test_packed_folders_load_as_the_student(tmp_path, text_source, family, plan):
    """Any plan; logits to the bit in float32, and weights to the bit whatever the dtype."""
    from transformers import AutoModelForCausalLM

    import qat.export.plugin  # noqa: F401 makes the model type known

    student = moved_student(family, plan, tied=family != "qwen3", attention_bias=True)
    wanted = student(TOKEN_IDS).logits
    export_to_hf_quantized(
        student, tmp_path / "a", text_source=text_source, plan=plan_of(student, plan).to_dict()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.equal(model(TOKEN_IDS).logits, wanted)
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
