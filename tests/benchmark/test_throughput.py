import torch
from torch import nn

from qat.benchmark.throughput import (
    WARM_UP_STEPS,
    flops_per_token,
    measure_steps,
    peak_flops,
    rates,
)
from qat.model.surgery import layers_of_kind
from tests.tiny import tiny_student


def test_warming_up_is_counted_apart(monkeypatch):
    """A first step of a minute moves no rate."""
    now = [0.0]
    costs = iter([60.0, 2.0, 1.0, 3.0, 1.0])
    monkeypatch.setattr("qat.benchmark.throughput.time.perf_counter", lambda: now[0])
    held = [5]

    def step():
        now[0] += next(costs)
        return torch.tensor(0.25)

    def afterwards():
        now[0] += 100
        held[0] = 9

    row = measure_steps(step, 3, lambda: None, lambda: held[0], afterwards)
    assert WARM_UP_STEPS == 2
    assert row == {
        "warm_up_seconds": 62.0,
        "seconds": [1.0, 3.0, 1.0],
        "step_seconds": 1.0,
        "step_bytes": 5,
        "peak_bytes": 9,
        "loss": 0.25,
    }
    told = rates({**row, "batch": 4, "flops_per_token": 50}, seq_len=16, peak=6400.0)
    assert told["tokens_per_second"] == 64
    assert told["tokens_per_second_spread"] == [64 / 3, 64]
    assert told["mfu"] == 0.5


def test_a_loss_that_is_no_number_is_told_as_none():
    """JSON cannot write it."""
    row = measure_steps(lambda: torch.tensor(torch.nan), 1, lambda: None, lambda: 0, lambda: None)
    assert row["loss"] is None


def test_multiplications_are_those_of_the_linear_layers():
    """Forward and activations' gradients everywhere, weights' gradients where they train."""
    student = tiny_student()  # width 64, MLP 128, 4 heads and 2 for keys of 16, two layers
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    mlp = 3 * 64 * 128
    head = 64 * student.config.vocab_size
    trained = list(layers_of_kind(student, "mlp").values())
    assert flops_per_token(student, trained) == 4 * (2 * (attention + mlp) + head) + 2 * 2 * mlp
    assert flops_per_token(nn.Sequential(nn.Linear(3, 5)), []) == 60


def test_peaks_are_known_by_the_names_that_chips_have():
    """An unknown chip or dtype has none, and L40 is not L4."""
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    assert peak_flops("v6e-1", "bf16") == 918e12
    assert peak_flops("NVIDIA L40", "bf16") is None
    assert peak_flops("Tesla T4", "bf16") is None
    assert peak_flops(None, "bf16") is None
