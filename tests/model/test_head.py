import pytest
import torch

from qat.model.head import hidden_states, logits_of
from tests.tiny import TINY_MODELS, tiny_gemma

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
