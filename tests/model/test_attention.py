"""Attention in float32 on a CPU: the numbers of transformers' own, better rounded in bfloat16."""

import pytest
import torch

from qat.model.attention import NAME, widen_attention
from tests.tiny import TINY_MODELS

TOKENS = torch.arange(48).view(2, 24)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_float32_models_say_what_they_said(family):
    """Masks, sliding windows and grouped heads are those of `sdpa`, to the bit."""
    model = TINY_MODELS[family]().eval()
    before = model(TOKENS).logits
    widen_attention(model)
    assert model.config._attn_implementation == NAME
    assert torch.equal(model(TOKENS).logits, before)


def test_bfloat16_attends_in_float32(monkeypatch):
    """The kernel sees float32, the model continues in bfloat16, gradients reach what attends."""
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *rest, **how):
        seen.append(query.dtype)
        return kernel(query, *rest, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = TINY_MODELS["llama"]().to(torch.bfloat16).requires_grad_()
    widen_attention(model)
    logits = model(TOKENS).logits
    assert logits.dtype == torch.bfloat16
    assert set(seen) == {torch.float32}
    logits.float().square().sum().backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient.dtype == torch.bfloat16
    assert gradient.abs().sum() > 0


def test_other_kinds_of_attention_are_left_alone(tmp_path):
    """What a model was told stays, and no file names ours."""
    model = TINY_MODELS["llama"]()
    model.set_attn_implementation("eager")
    widen_attention(model)
    assert model.config._attn_implementation == "eager"
    other = TINY_MODELS["llama"]()
    widen_attention(other)
    other.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
