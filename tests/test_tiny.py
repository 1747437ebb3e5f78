import pytest
import torch

from tests.tiny import TINY_MODELS, VOCAB_SIZE, tiny_tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_model_is_the_same_for_a_seed(name, tied):
    """A seed names a model; its logits span the padded vocabulary."""
    token_ids = torch.arange(6)[None]
    logits = TINY_MODELS[name](tied=tied)(token_ids).logits
    assert logits.shape == (1, 6, VOCAB_SIZE)
    assert torch.equal(logits, TINY_MODELS[name](tied=tied)(token_ids).logits)


def test_tokenizer_gives_text_back():
    """Decoding what was encoded returns the text, whatever it is."""
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 261
    text = "Café, 2 + 2 =\n\t4; \U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
