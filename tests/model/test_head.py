import pytest
import torch

from qat.model.head import hidden_states, logits_at, logits_of
from tests.tiny import TINY_MODELS, tiny_gemma, tiny_llama

TOKEN_IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_two_halves_make_the_model(family, tied):
    """Hidden states through the head are the model's own logits, to the bit."""
    model = TINY_MODELS[family](tied=tied)
    hidden = hidden_states(model, TOKEN_IDS)
    assert hidden.shape == (2, 12, 64)
    assert torch.equal(logits_of(model, hidden), model(TOKEN_IDS).logits)


def test_a_soft_cap_is_part_of_the_head():
    """Gemma 2 squeezes its logits: teacher and student would differ without it."""
    model = tiny_gemma(final_logit_softcapping=2.0)
    logits = logits_of(model, hidden_states(model, TOKEN_IDS))
    assert torch.equal(logits, model(TOKEN_IDS).logits)
    assert logits.abs().max() <= 2.0


@pytest.mark.parametrize("family", TINY_MODELS)
def test_logits_of_some_tokens_are_those_of_all(family):
    """The same tokens for all positions, or their own for each."""
    changes = {"final_logit_softcapping": 2.0} if family == "gemma" else {}
    model = TINY_MODELS[family](**changes)
    hidden = hidden_states(model, TOKEN_IDS).flatten(0, 1)
    logits = logits_of(model, hidden)
    own = torch.randint(logits.shape[-1], (len(hidden), 5))
    assert torch.allclose(logits_at(model, hidden, own), logits.gather(-1, own), atol=1e-5)
    shared = torch.tensor([7, 0, 271])
    assert torch.allclose(logits_at(model, hidden, shared), logits[:, shared], atol=1e-5)


def test_a_heads_bias_is_part_of_its_rows():
    """Each token's own number."""
    model = tiny_llama(tied=False)
    model.lm_head = torch.nn.Linear(64, 272)
    hidden, own = torch.randn(3, 64), torch.randint(272, (3, 5))
    expected = model.lm_head(hidden).gather(-1, own)
    assert torch.allclose(logits_at(model, hidden, own), expected, atol=1e-5)
