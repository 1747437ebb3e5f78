"""What hours are predicted, against operations counted by hand."""

import pytest
import torch

from qat.model.architectures import read_architecture
from qat.model.checkpoint import empty_model_of
from qat.model.surgery import model_tensors
from qat.pipelines.planned_hours import ACCELERATORS, forward_operations, predict_hours
from qat.pipelines.planned_memory import ModelSizes, Situation
from qat.quant.plan import read_plan

THERE = Situation(dtype=torch.bfloat16, batch_size=8, seq_len=64)


def sizes_of(name):
    model = empty_model_of(read_architecture(name), device="meta")
    return ModelSizes.of(model, read_plan("q4a4", model_tensors(model)))


def test_a_token_costs_two_operations_a_weight():
    """Kisoku's shape: its linears by hand, queries of 3072 against half of 64 keys and values."""
    layer = 2 * 3072 * 3072 + 2 * 3072 * 768 + 3 * 3072 * 8192
    sizes = sizes_of("kisoku-3.2b")
    assert sizes.linears == 32 * layer
    assert forward_operations(sizes, 64) == 2 * 32 * layer + 32 * 2 * 3072 * 64


def test_hours_follow_from_peak_share_and_chips():
    """A billion tokens of 3.3 B weights on an H100 at 40%: 6 N over the rate, to a few percent."""
    sizes = sizes_of("kisoku-3.2b")
    found = predict_hours(sizes, THERE, 1e9, 0.4)
    assert found.keys() == ACCELERATORS.keys()
    simple = 6 * 3.3256e9 * 1e9 / (0.4 * 989e12) / 3600
    assert found["H100"].pretrain_hours == pytest.approx(simple, rel=0.03)
    assert found["v6e-1"].distil_hours == pytest.approx(8 * found["v6e-8"].distil_hours)
    twice = predict_hours(sizes, THERE, 2e9, 0.2)
    for name, one in found.items():
        assert twice[name].cache_hours == pytest.approx(4 * one.cache_hours)
        assert one.cache_hours < one.pretrain_hours / 3 < one.distil_hours / 3


def test_memory_is_that_of_a_chip():
    """Weights, gradients and AdamW of 3.3 B do not fit one of 32 GB; their rows on eight do."""
    found = predict_hours(sizes_of("kisoku-3.2b"), THERE, 1e9, 0.4)
    alone, eight = found["v6e-1"], found["v6e-8"]
    assert alone.pretrain_bytes > 18 * 3.3e9 > alone.memory
    assert eight.pretrain_bytes < eight.memory
    assert eight.distil_bytes < eight.memory
