import pytest
import torch

from qat.model.architectures import count_parameters, new_model
from qat.model.factorized import whole_tensors
from qat.model.load import load_dense
from tests.tiny import tiny_gemma, tiny_llama

IDS = torch.arange(40)[None]


def factorized(rank=16, **changes):
    config = tiny_llama(tied=False, **changes).config
    config.embedding_rank = rank
    return config, new_model(config)


def test_the_saved_model_is_a_plain_one_that_computes_the_same(tmp_path):
    """Its embedding is the product; nothing in its folder speaks of a rank."""
    _, model = factorized()
    model.save_pretrained(tmp_path, state_dict=whole_tensors(model))
    plain = load_dense(tmp_path)
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    assert not hasattr(plain.config, "embedding_rank")
    assert torch.allclose(plain(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert whole_tensors(plain) is None


def test_rows_are_drawn_as_large_as_others_and_both_factors_train():
    """V R and R H weights in place of V H; the gradient reaches rows that were looked up."""
    config, model = factorized()
    embedding = model.get_input_embeddings()
    rows = config.vocab_size
    assert count_parameters(config)[1] == 16 * (rows + 64)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)[0]
    assert embedding.product().std().item() == pytest.approx(config.initializer_range, rel=0.1)
    model(IDS).logits.square().sum().backward()
    is_moved = embedding.weight.grad.abs().sum(1) > 0
    assert torch.equal(is_moved.nonzero().flatten(), IDS[0])
    assert embedding.projection.weight.grad.abs().min() > 0


def test_what_cannot_be_factorized_is_refused():
    """With the field of config.json."""
    config = tiny_llama().config
    config.embedding_rank = 16
    with pytest.raises(ValueError, match="set tie_word_embeddings to false in config.json"):
        new_model(config)
    with pytest.raises(ValueError, match="embedding_rank 64 must be within 1 and 63"):
        factorized(64)
    config = tiny_gemma(tied=False).config
    config.embedding_rank = 16
    with pytest.raises(ValueError, match="scales its rows"):
        new_model(config)
