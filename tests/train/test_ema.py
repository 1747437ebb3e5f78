import pytest
import torch

from qat.train.ema import MovingAverage


def test_the_average_moves_towards_the_parameters():
    """average = decay * average + (1 - decay) * parameter, step by step."""
    parameter = torch.tensor([1.0, 2.0])
    ema = MovingAverage([parameter], 0.75)
    expected = parameter.clone()
    for _ in range(3):
        parameter += 1.0
        ema.update()
        expected = 0.75 * expected + 0.25 * parameter
    assert torch.allclose(ema.averages[0], expected)


def test_averages_stand_in_and_step_back():
    """Inside the block the model is the average; after it, also after an error, it is itself."""
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = MovingAverage([parameter], 0.5)
    parameter.data += 2.0
    ema.update()
    with ema.in_place():
        assert parameter.item() == 2.0
    assert parameter.item() == 3.0
    with pytest.raises(KeyError), ema.in_place():
        raise KeyError
    assert parameter.item() == 3.0
    assert ema.averages[0].item() == 2.0
