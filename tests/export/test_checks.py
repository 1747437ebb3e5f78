"""What every export checks."""

import torch

from qat.export.checks import equal_bits


def test_bits_are_compared_not_values():
    """Minus zero is not zero, a NaN equals itself, a dtype counts."""
    assert not equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert equal_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not equal_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float16))
