"""Products in float8 by torchao, which any device emulates by rounding to it."""

import pytest
import torch

from qat.train.float8 import multiply_in_float8
from tests.tiny import tiny_llama

pytest.importorskip("torchao", reason="`make parity` installs torchao")
pytestmark = pytest.mark.parity
IDS = torch.arange(2, 32).view(2, 15)  # a number of tokens that is no multiple of 16


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
