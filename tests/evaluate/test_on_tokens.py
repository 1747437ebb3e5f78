import math

import pytest
import torch

from qat.data.token_dataset import TokenBlocks, TokenDataset
from qat.evaluate.on_tokens import evaluate_on_tokens
from tests.tiny import tiny_llama, tiny_shards


@pytest.mark.parametrize("is_separate", [False, True])
def test_perplexity_is_of_the_labels_that_count(tmp_path, is_separate):
    """The exponential of their mean nats, by hand; first tokens of documents are none of them."""
    tokens = TokenDataset.open(tiny_shards(tmp_path))
    blocks, model = TokenBlocks(tokens, "heldout", 32), tiny_llama()
    total, count = 0.0, 0
    for place in (number * len(blocks) // 4 for number in range(4)):
        ids, documents, mask = blocks[place]
        start = 0
        for end in [*(n + 1 for n in range(31) if not mask[0, n]), 32]:
            part = ids[:, start:end] if is_separate else ids
            log_probs = torch.log_softmax(model(part).logits, dim=-1)[0]
            log_probs = log_probs if is_separate else log_probs[start:end]
            for here, label in enumerate(ids[0, start + 1 : end].tolist()):
                total, count = total - log_probs[here, label].item(), count + 1
            start = end
        assert len(documents[0].unique()) == 1 + int((~mask).sum())
    values = evaluate_on_tokens(
        model, blocks, device=torch.device("cpu"), num_sequences=4, is_separate=is_separate
    )
    assert values["tokens"] == count
    assert values["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
