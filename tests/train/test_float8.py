"""Where products may be in float8; what torchao makes of them is tested in `tests/parity`."""

import sys

import pytest
import torch

from qat.runtime.device import has_float8
from qat.train.float8 import why_no_float8

CPU = torch.device("cpu")


def test_a_cpu_says_that_it_has_none():
    """And so does a device whose dtype float8 does not go with."""
    assert not has_float8(CPU)
    assert why_no_float8(CPU, torch.bfloat16) == "cpu does not multiply in float8"


@pytest.mark.parametrize(
    ("dtype", "installed", "said"),
    [
        (torch.float32, True, "give --dtype bf16"),
        (torch.bfloat16, False, "pip install"),
        (torch.bfloat16, True, None),
    ],
)
def test_what_is_missing_is_said(monkeypatch, dtype, installed, said):
    """On a device that has float8."""
    module = sys.modules[why_no_float8.__module__]
    monkeypatch.setattr(module, "has_float8", lambda _device: True)
    monkeypatch.setattr(module, "find_spec", lambda _name: installed or None)
    why = why_no_float8(CPU, dtype)
    assert why is None if said is None else said in why
