"""Products in float8, which any device emulates by rounding to it."""

import sys

import pytest
import torch

from qat.runtime.device import has_float8
from qat.train.float8 import multiply_in_float8, why_no_float8
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
IDS = torch.arange(2, 34).view(2, 16)


def test_linears_of_layers_multiply_in_float8_and_no_others():
    """Near what they gave, under the same names; gradients arrive at the same parameters."""
    model = tiny_llama().requires_grad_()
    names, weights = list(model.state_dict()), list(model.parameters())
    plain = model.model.layers[0].mlp.up_proj
    x = torch.randn(4, plain.in_features)
    expected = plain(x)
    count = multiply_in_float8(model, emulate=True)
    assert count == 2 * 7
    rounded = model.model.layers[0].mlp.up_proj
    assert rounded is not plain
    assert rounded.weight is plain.weight
    error = (rounded(x) - expected).norm() / expected.norm()
    assert 0.001 < error < 0.1  # e4m3 has three bits behind the point
    assert type(model.lm_head) is torch.nn.Linear
    assert list(model.state_dict()) == names
    model(IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in weights)


def test_narrow_linears_stay():
    """Sides that are no multiple of 16 have no such product."""
    model = tiny_llama(intermediate_size=72).requires_grad_()
    multiply_in_float8(model, emulate=True)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is not torch.nn.Linear


def test_a_model_trains_in_float8():
    """The loss falls as it does without."""
    model = tiny_llama().requires_grad_()
    multiply_in_float8(model, emulate=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


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
