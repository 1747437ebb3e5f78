"""A student trained on a deployable grid ships as it is: from training to four formats, exact."""

import json

import pytest
import torch

from qat.cli.commands import main
from qat.grids.scalar import fixed_codebook
from qat.model.surgery import quantized_layers
from qat.pipelines.open_checkpoint import load_model
from qat.train.trainable import choose_trainable
from tests.tiny import tiny_cache, tiny_student


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps at a rate that moves codes, scales and whatever may move."""
    folder = tmp_path_factory.mktemp("trained")
    cache = tiny_cache(folder, seq_len=32)
    flags = ["--cache-dir", cache, "--fit", "moments", "--dtype", "fp32", "--device", "cpu"]
    flags += ["--model", folder / "teacher", "--plan", "deploy", "--output", folder / "start"]
    assert main("init-student", [str(flag) for flag in flags]) == 0
    flags = ["--checkpoint", folder / "start", "--cache-dir", cache, "--dtype", "fp32"]
    flags += [
        "--output-dir",
        folder / "run",
        "--max-steps",
        3,
        "--optim.lr",
        0.01,
        "--device",
        "cpu",
    ]
    flags += ["--batch-size", 2, "--trainable", "weights", "scales", "codebooks"]
    assert main("train", [str(flag) for flag in flags]) == 0
    return folder


def test_training_moves_codes_and_keeps_the_grid(trained):
    """Codes and scales move; codebooks stay the format's, scales numbers of both dtypes."""
    start, _header = load_model(trained / "start")
    after, _header = load_model(trained / "run" / "final")
    moved = 0
    for name, layer in quantized_layers(after).items():
        before = start.get_submodule(name)
        moved += int((layer.indices != before.indices).sum())
        assert torch.equal(layer.codebook, fixed_codebook("int", layer.spec.bits))
        assert torch.equal(layer.scale.bfloat16().float(), layer.scale)
        assert torch.equal(layer.scale.half().float(), layer.scale)
        assert not torch.equal(layer.scale, before.scale)
    assert moved > 0


@pytest.mark.parametrize("to", ["gguf", "mlx", "compressed-tensors", "hf-quantized"])
def test_the_trained_student_is_exported_to_the_bit(trained, tmp_path, capsys, to):
    """No scale is fitted anew on the way."""
    flags = ["--checkpoint", trained / "run" / "final", "--to", to, "--output", tmp_path / "out"]
    assert main("export", [str(flag) for flag in flags]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True


@pytest.mark.parametrize("plan", ["deploy", "gguf:iq4_nl"])
def test_codebooks_of_runtimes_do_not_train(plan):
    """A file has no place for other values; where nothing else is asked for, that is an error."""
    student = tiny_student("llama", plan)
    with pytest.raises(ValueError, match="finds nothing"):
        choose_trainable(
            student, kinds=("mlp",), parts=("codebooks",), weight_of=lambda _name: None
        )
