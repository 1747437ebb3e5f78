import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.model.layered import NeedsWhole, open_layered
from qat.model.load import load_dense
from tests.tiny import save_tiny, tiny_gemma, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder that no test changes."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", tiny_llama())


@pytest.fixture
def copy(folder, tmp_path):
    """A model folder that may be changed."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_have_the_values_of_the_whole_model_while_they_are_loaded(tmp_path, dtype):
    """To the bit, buffers that are in no file among them; before and after there are none."""
    save_tiny(tmp_path, tiny_gemma())
    whole, layered = load_dense(tmp_path, dtype=dtype), open_layered(tmp_path, dtype)
    expected = dict(whole.named_parameters())
    assert list(layered.tensors()) == list(expected)
    for name, buffer in whole.named_buffers():
        assert torch.equal(layered.model.get_buffer(name), buffer)
    for key in expected:
        with layered.loaded([key]):
            found = dict(layered.model.named_parameters())
            assert torch.equal(found.pop(key), expected[key])
            assert {parameter.device.type for parameter in found.values()} == {"meta"}
        assert layered.model.get_parameter(key).device.type == "meta"


def test_a_tied_head_computes_with_the_embedding_that_is_loaded(folder):
    """It is one tensor, loaded and dropped once."""
    layered = open_layered(folder, torch.float32)
    head, embedding = layered.model.get_output_embeddings(), layered.model.get_input_embeddings()
    for keys in ([], ["model.embed_tokens.weight"]):
        with layered.loaded(keys):
            assert head.weight is embedding.weight
        assert head.weight is embedding.weight


def test_files_of_several_shards_are_read(copy):
    """By their index, as transformers does."""
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    where = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(tensors)}
    for file in set(where.values()):
        part = {key: tensors[key] for key, name in where.items() if name == file}
        save_file(part, copy / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    layered = open_layered(copy, torch.float32)
    assert all(torch.equal(layered.read(key), tensor) for key, tensor in tensors.items())


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_a_tied_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_tensor, "model.norm.weight is not there"),
        (with_a_tied_tensor, "lm_head.weight is tied, and there"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda folder: change_config(folder, intermediate_size=64), "is not as config.json has"),
        (
            lambda folder: change_config(folder, quantization_config={"quant_method": "fp8"}),
            "its weights are quantized",
        ),
    ],
)
def test_what_is_not_read_as_it_stands_is_left_to_the_loader(copy, change, said):
    """transformers converts names and formats, and tells what is wrong with the others."""
    change(copy)
    with pytest.raises(NeedsWhole, match=said):
        open_layered(copy, torch.float32).read("model.layers.0.mlp.up_proj.weight")


def test_weights_that_are_not_finite_are_named(copy):
    """As the loader names them."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"copy: tensor model\.norm\.weight holds NaN.*again"):
        open_layered(copy, torch.float32).read("model.norm.weight")
