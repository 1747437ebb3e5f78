"""Where a pipeline computes, and in which dtype."""

from dataclasses import dataclass

import torch

from qat.runtime.config import PlaceConfig
from qat.runtime.device import Device
from qat.tracking.messages import say


@dataclass(frozen=True, slots=True)
class Place:
    """A device and the compute dtype on it."""

    device: Device
    dtype: torch.dtype

    @classmethod
    def of(cls, config: PlaceConfig) -> "Place":
        """Return the place that a config asks for, and say which device it is."""
        device = Device.detect(config.device)
        say(device.describe())
        return cls(device, device.dtype_from_name(config.dtype))
