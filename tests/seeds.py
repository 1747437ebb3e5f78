"""Checkpoints of the seeds' forms, made here from random numbers by the plainest code there is.

What a student must compute from one is worked out next to it: `expected` holds the weight of each
quantized linear as their forward has it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.model.surgery import quantized_layers
from tests.tiny import save_tiny, tiny_qwen3

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"


@dataclass
class SeedFile:
    """A state dict, what it means, and where it goes."""

    state: dict[str, Tensor]
    expected: dict[str, Tensor]
    config: dict
    base: Path

    def write(self, folder: Path, name: str = "best_state_dict.pt") -> Path:
        """Write file and config; return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state, folder / name)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder / name


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears that the seeds quantize, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in MLP + ATTENTION
    }


def uniform(size: int) -> Tensor:
    """Return the even codebook of -1 .. 1 as float16 numbers."""
    return torch.linspace(-1, 1, size).half().float()


def random_indices(shape: torch.Size, size: int) -> Tensor:
    """Return indices (O, I) int64."""
    return torch.randint(0, size, tuple(shape))


def make_v2(folder: Path, **changes) -> SeedFile:
    """Return a second-form checkpoint of a tiny model whose folder is `folder / "base"`.

    Args:
        folder: Where the base model is saved.
        changes: Fields of config.json.
    """
    model = tiny_qwen3(**changes.pop("model", {}))
    base = save_tiny(folder / "base", model)
    state, expected = {}, {}
    linears = linears_of(model)
    for key, tensor in model.state_dict().items():
        owner = key.rpartition(".")[0]
        if owner not in linears:
            state[key] = tensor.clone()
            continue
        if key.endswith(".bias"):
            state[key] = tensor.clone()
            continue
        is_mlp = owner.rpartition(".")[2] in MLP
        size, rank = (4, 6) if is_mlp else (16, 3)
        num_outputs, num_inputs = tensor.shape
        codebook, indices = uniform(size), random_indices(tensor.shape, size)
        scale_a = torch.randn(num_outputs, rank)
        magnitude = torch.rand(rank) + 0.5
        scale_b = torch.randn(rank, num_inputs)
        state |= {
            f"{owner}.weight": tensor.clone(),
            f"{owner}.lut": codebook,
            f"{owner}.scale_A": scale_a,
            f"{owner}.scale_B": scale_b,
            f"{owner}.rank_magnitude": magnitude,
            f"{owner}._Q": codebook[indices],
            f"{owner}._indices": indices,
            f"{owner}._scales_baked_flag": torch.tensor(0, dtype=torch.int8),
        }
        expected[owner] = codebook[indices] * v2_scale(scale_a, magnitude, scale_b)
    config = {"version": "v2", "model_id": "base", **changes}
    return SeedFile(state, expected, config, base)


def v2_scale(scale_a: Tensor, magnitude: Tensor, scale_b: Tensor) -> Tensor:
    """Return the second form's scales, (O, I), as a sum over ranks."""
    scale = torch.zeros(len(scale_a), scale_b.shape[1])
    for rank in range(len(magnitude)):
        column = scale_a[:, rank] / max(float(scale_a[:, rank].norm()), 1e-6)
        row = scale_b[rank] / max(float(scale_b[rank].norm()), 1e-6)
        scale += (magnitude[rank] + 1e-6) * column[:, None] * row[None, :]
    return scale


def make_v1(folder: Path, *, group_size: int = 24) -> SeedFile:
    """Return a first-form checkpoint; some products are negative, B is padded to whole groups."""
    model = tiny_qwen3()
    base = save_tiny(folder / "base", model)
    state, expected = {}, {}
    linears = linears_of(model)
    for key, tensor in model.state_dict().items():
        owner = key.rpartition(".")[0]
        if owner not in linears:
            state[key] = tensor.clone()
            continue
        size, rank = (4, 5) if owner.rpartition(".")[2] in MLP else (16, 2)
        num_outputs, num_inputs = tensor.shape
        padded = -(-num_inputs // group_size) * group_size
        scale_a = torch.rand(num_outputs, rank) + torch.randn(num_outputs, rank) * 0.4
        scale_b = torch.rand(rank, padded) + torch.randn(rank, padded) * 0.4
        state |= {
            f"{owner}.weight": tensor.clone(),
            f"{owner}.lut": uniform(size),
            f"{owner}.scale_A": scale_a,
            f"{owner}.scale_B": scale_b,
        }
        scale = (scale_a @ scale_b)[:, :num_inputs].clamp(min=1e-8)
        steps = ((tensor / scale).clamp(-1, 1) + 1) * (size - 1) / 2
        expected[owner] = uniform(size)[steps.round().long()] * scale
    config = {"version": "v1", "model_id": "base", "group_size": group_size}
    return SeedFile(state, expected, config, base)


def close(student, expected):
    """Whether every quantized weight is the expected one to float32 rounding."""
    layers = quantized_layers(student)
    assert layers.keys() == expected.keys()
    return all(
        (layers[name].fake_quantized_weight() - weight).abs().max() <= 2e-6 * weight.abs().max()
        for name, weight in expected.items()
    )
