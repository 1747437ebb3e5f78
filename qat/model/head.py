"""A causal LM in two halves: hidden states, and the head that makes logits of them.

A loss that needs logits of a few positions at a time then never holds tokens x vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.runtime.device import is_traced


def hidden_states(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Return the final hidden states of a batch, (B, L, H), after the last norm."""
    decoder = model.get_decoder()
    masks = causal_masks(decoder.config, token_ids) if is_traced(token_ids.device) else None
    return decoder(input_ids=token_ids, attention_mask=masks, use_cache=False).last_hidden_state


def causal_masks(config: Any, token_ids: Tensor) -> Any:
    """Return the masks that a decoder would make for full blocks, in the form it takes them in.

    Without any given, transformers looks at the positions' values to choose among its own.
    """
    from transformers.masking_utils import create_masks_for_generate

    num_positions = token_ids.shape[1]
    return create_masks_for_generate(
        config,
        torch.empty(1, num_positions, 0, device=token_ids.device),
        attention_mask=None,
        past_key_values=None,
        # True everywhere; with it a mask is made also where the kernel has its own.
        and_mask_function=lambda _batch, _head, query, _key: query >= 0,
    )


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the model's logits, (..., V), for hidden states (..., H)."""
    return capped(model, model.get_output_embeddings()(hidden))


def logits_at(model: nn.Module, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """Return the model's logits of some tokens only; the head's other rows are not read.

    Args:
        model: A causal LM.
        hidden: Hidden states, (N, H).
        token_ids: The same tokens for all positions, (R,), or their own for each, (N, K).

    Returns:
        (N, R) or (N, K).
    """
    head = model.get_output_embeddings()
    rows = head.weight[token_ids]  # (R, H) or (N, K, H)
    is_shared = token_ids.dim() == 1
    logits = hidden @ rows.T if is_shared else (rows @ hidden.unsqueeze(-1)).squeeze(-1)
    bias = getattr(head, "bias", None)
    return capped(model, logits if bias is None else logits + bias[token_ids])


def capped(model: nn.Module, logits: Tensor) -> Tensor:
    """Return logits squeezed as the model's config says."""
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap
