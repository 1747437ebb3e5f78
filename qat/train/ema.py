"""A moving average of what trains, measured and kept in its place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """Keeps average = decay * average + (1 - decay) * parameter, step by step."""

    def __init__(self, parameters: list[Tensor], decay: float):
        self.parameters = parameters
        self.decay = decay
        self.averages = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters of one more step."""
        torch._foreach_lerp_(self.averages, self.parameters, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages in the parameters' place inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange parameters and averages."""
        for number, parameter in enumerate(self.parameters):
            held = parameter.data
            parameter.data = self.averages[number]
            self.averages[number] = held
