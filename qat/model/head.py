"""A causal LM in two halves: hidden states, and the head that makes logits of them.

A loss that needs logits of a few positions at a time then never holds tokens x vocabulary.
"""

import torch
from torch import Tensor, nn


def hidden_states(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Return the final hidden states of a batch, (B, L, H), after the last norm."""
    decoder = model.get_decoder()
    return decoder(input_ids=token_ids, use_cache=False).last_hidden_state


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the model's logits, (..., V), for hidden states (..., H)."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap
