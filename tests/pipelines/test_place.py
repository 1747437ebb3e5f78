from types import SimpleNamespace

import pytest
import torch

from qat.pipelines.place import Place


def test_a_place_is_what_the_config_asks_for():
    """Names become objects; a dtype that is none is refused."""
    place = Place.of(SimpleNamespace(device="cpu", dtype="bf16"))
    assert (place.device.kind, place.dtype) == ("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="int3"):
        Place.of(SimpleNamespace(device="cpu", dtype="int3"))
