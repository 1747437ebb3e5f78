"""One matmul per rank computes what one matmul in all does."""

from dataclasses import replace

import pytest
import torch

from qat.grids.scales import LowRank
from qat.model.layers import FakeQuantLinear
from qat.model.rankwise import RankwiseLinear, as_group_scales, low_rank_factors, widen
from qat.model.surgery import quantized_layers, swap
from qat.quant.spec import make_spec
from tests.tiny import tiny_student

OUTPUTS, INPUTS, RANK = 24, 32, 5


def random_layer(plan: make_spec, *, has_bias: bool = True) -> FakeQuantLinear:
    layer = FakeQuantLinear(INPUTS, OUTPUTS, plan, has_bias=has_bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.indices = torch.randint(0, 2**plan.bits, (OUTPUTS, INPUTS), dtype=torch.uint8)
    return layer


PLANS = {
    "low rank float16": make_spec(bits=2, rank=RANK),
    "low rank float32": make_spec(bits=4, rank=RANK, stored_dtype="float32"),
    "groups": make_spec(bits=2, group_size=8),
    "one scale a row": make_spec(bits=4, group_size=0),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_the_sum_over_ranks_is_the_expanded_matrix(plan):
    """y = sum_k g_k a_k * (Q (b_k * x)) equals (Q * S) x."""
    layer = random_layer(plan)
    x = torch.randn(2, 3, INPUTS)
    expected = layer(x)
    found = RankwiseLinear(layer)(x)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max() * INPUTS


def test_gradients_are_the_same():
    """Training rank by rank and training the formed weight go the same way."""
    layer = random_layer(make_spec(bits=2, rank=RANK, stored_dtype="float32"))
    x = torch.randn(7, INPUTS)
    gradients = []
    for forward in (layer, RankwiseLinear(layer)):
        forward(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in (layer.scale_a, layer.magnitude, layer.scale_b)])
        layer.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_whole_model_gives_the_same_logits():
    """Swapping every layer changes no logit beyond float32 rounding."""
    student = tiny_student("llama", "q2a4_r4")
    token_ids = torch.arange(12).view(2, 6)
    expected = student(token_ids).logits
    for name, layer in quantized_layers(student).items():
        swap(student, name, RankwiseLinear(layer))
    assert (student(token_ids).logits - expected).abs().max() < 1e-4


def test_a_floored_scale_is_no_sum_over_ranks():
    """The first form's floor is refused with the command that takes it away."""
    layer = random_layer(make_spec(bits=2, rank=RANK, floor=1e-8))
    with pytest.raises(ValueError, match="convert-v1-to-v2"):
        RankwiseLinear(layer)


def test_wider_factors_have_the_same_product():
    """Added ranks have magnitude zero; directions are float16 numbers of length one."""
    layer = random_layer(replace(PLANS["low rank float32"]))
    factors = low_rank_factors(layer)
    wider = widen(factors, RANK + 3)
    assert torch.equal(
        (wider.scale_a * wider.magnitude) @ wider.scale_b,
        (wider.scale_a[:, :RANK] * wider.magnitude[:RANK]) @ wider.scale_b[:RANK],
    )
    assert wider.magnitude[RANK:].tolist() == [0, 0, 0]
    assert torch.allclose(wider.scale_a[:, RANK:].norm(dim=0), torch.ones(3), atol=1e-3)
    assert torch.equal(wider.scale_b.half().float()[RANK:], wider.scale_b[RANK:])
    assert widen(factors, RANK) is factors


def test_group_scales_come_back_from_their_factors():
    """Groups as low rank, widened, are found to be groups again; other factors are not."""
    layer = random_layer(make_spec(bits=2, group_size=8))
    factors = widen(low_rank_factors(layer), 9)
    assert torch.equal(as_group_scales(factors), layer.scale)
    other = factors.scale_b.clone()
    other[0, 0] = 0.5
    assert as_group_scales(LowRank(factors.scale_a, factors.magnitude, other)) is None
    assert as_group_scales(LowRank(*(f * 0 for f in factors))) is None
