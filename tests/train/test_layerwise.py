from types import SimpleNamespace

import pytest
import torch

from qat.model.surgery import hold_weights, quantized_layers, thaw_indices
from qat.train import layerwise
from qat.train.blockwise import Teacher
from qat.train.config import LayerwiseConfig, OptimConfig, TrainConfig
from qat.train.layerwise import block_rate, layerwise_stage, read_blocks, write_block
from qat.train.trainable import rate_units
from tests.tiny import tiny_llama, tiny_student


def test_the_rate_warms_up_and_falls():
    """Within one block, from a share of the peak to the peak and down to the least."""
    rates = [block_rate(0.1, step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(0.5)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_finished_blocks_come_back(tmp_path):
    """A second process continues behind the last whole block, with what the first one learned."""
    student = tiny_student()
    hold_weights(student, torch.float32)
    block = student.get_decoder().layers[0]
    for layer in quantized_layers(block).values():
        thaw_indices(layer)
        layer.latent_weight.data *= 1.5
    write_block(tmp_path, 0, block, 2.0, {"first": 1.0, "last": 0.5})
    other, frozen = tiny_student(), tiny_student()
    assert read_blocks(tmp_path, other) == read_blocks(tmp_path, frozen, freeze=True) == (1, 2.0)
    found, fixed = (quantized_layers(one.get_decoder().layers[0]) for one in (other, frozen))
    for name, layer in quantized_layers(block).items():
        assert torch.equal(found[name].latent_weight, layer.latent_weight)
        assert fixed[name].latent_weight is None
        for one in (found[name], fixed[name]):
            assert torch.equal(one.fake_quantized_weight(), layer.fake_quantized_weight())
    rest = quantized_layers(other.get_decoder().layers[1]).values()
    assert all(layer.latent_weight is None for layer in rest)
    stored = tmp_path / "000.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=f"{stored} has the sha256 .*; remove {tmp_path}"):
        read_blocks(tmp_path, other)


@pytest.mark.parametrize("relative", [True, False])
def test_rates_of_the_stage_are_shares_where_those_of_the_run_are(tmp_path, monkeypatch, relative):
    """Each parameter's peak is the rate times what it is a share of, or the rate itself."""
    base, found = tiny_llama(), []
    student = tiny_student()
    block = student.get_decoder().layers[0]

    def prepare_one(*_arguments, prepare, **_hooks):
        found.append(prepare(0, block))

    monkeypatch.setattr(layerwise, "train_blockwise", prepare_one)
    layerwise_stage(
        TrainConfig(
            checkpoint=tmp_path,
            cache_dir=tmp_path,
            output_dir=tmp_path / "run",
            optim=OptimConfig(relative=relative),
            layerwise=LayerwiseConfig(sequences=4),
        ),
        student,
        Teacher(base),
        SimpleNamespace(spread_ids=range),
        weight_of=lambda name: base.get_submodule(name).weight,
        rates={"weights": 0.5, "scales": 0.1, "codebooks": 0.1},
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    ((layers, optimizer),) = found
    peaks = {p: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    units = rate_units(block)
    for layer in layers:
        unit = units[layer.latent_weight] if relative else 1.0
        assert peaks[layer.latent_weight] == pytest.approx(0.5 * unit)
