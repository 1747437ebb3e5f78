"""A causal LM in two halves: hidden states, and the head that makes logits of them.

A loss that needs logits of a few positions at a time then never holds tokens x vocabulary.
"""

import logging
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qat.model.attention import NAME
from qat.runtime.device import is_traced

MASKED_ATTENTION = ("eager", "sdpa", NAME)
logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """A batch as a model reads it."""

    token_ids: Tensor
    """(B, L) int64."""
    document_ids: Tensor | None = None
    """(B, L), equal ids in a row = one document: documents do not attend to each other, and
    positions restart with each. None = each block is one document."""

    @classmethod
    def of(cls, batch: "Tensor | Tokens") -> "Tokens":
        """Return a batch that may be given as token ids alone."""
        return cls(batch) if isinstance(batch, Tensor) else batch

    def to(self, device: torch.device) -> "Tokens":
        """Return the same batch on another device."""
        return Tokens(*(ids if ids is None else ids.to(device) for ids in self))


def hidden_states(
    model: nn.Module, token_ids: Tensor, document_ids: Tensor | None = None
) -> Tensor:
    """Return the final hidden states of a batch, (B, L, H), after the last norm; see `Tokens`."""
    decoder = model.get_decoder()
    separation = separate_documents(decoder.config, Tokens(token_ids, document_ids))
    return decoder(input_ids=token_ids, **separation, use_cache=False).last_hidden_state


def separate_documents(config: PreTrainedConfig, batch: Tokens) -> dict[str, Any]:
    """Return what a decoder of this config is called with to keep documents apart.

    transformers finds documents in the positions; where each block is one it makes no mask.
    """
    masks = positions = None
    if batch.document_ids is not None:
        warn_unless_maskable(config._attn_implementation)
        positions = document_positions(batch.document_ids)
    if is_traced(batch.token_ids.device):
        masks = causal_masks(config, *batch)
    return {"attention_mask": masks, "position_ids": positions}


def document_positions(document_ids: Tensor) -> Tensor:
    """Return each token's position in its document, (B, L) int64."""
    is_same = document_ids.unsqueeze(1) == document_ids.unsqueeze(2)  # (B, L, L)
    return is_same.tril().sum(dim=2) - 1  # cummax would leave an XLA device


@cache
def warn_unless_maskable(attention: str) -> None:
    """Say once that this attention lets documents of one block see each other."""
    if attention not in MASKED_ATTENTION:
        logger.warning(
            "attention %s takes no mask: documents in one block attend to each other; "
            "load the model with attn_implementation sdpa",
            attention,
        )


def causal_masks(
    config: PreTrainedConfig, token_ids: Tensor, document_ids: Tensor | None = None
) -> Any:
    """Return the masks that a decoder would make for full blocks, in the form it takes them in.

    Without any given, transformers looks at the positions' values to choose among its own.
    """
    from transformers.masking_utils import create_masks_for_generate

    def is_visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if document_ids is None:  # True everywhere: a mask is made also where the kernel has one
            return query >= 0
        return document_ids[batch, query] == document_ids[batch, key]

    batch_size = 1 if document_ids is None else len(token_ids)
    return create_masks_for_generate(
        config,
        torch.empty(batch_size, token_ids.shape[1], 0, device=token_ids.device),
        attention_mask=None,
        past_key_values=None,
        and_mask_function=is_visible,
    )


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the model's logits, (..., V), for hidden states (..., H)."""
    return scale_logits(model.get_output_embeddings()(hidden), *logit_scaling(model.config))


def logits_at(model: nn.Module, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """Return the model's logits of some tokens only; the head's other rows are not read.

    Args:
        model: A causal LM.
        hidden: Hidden states, (N, H).
        token_ids: The same tokens for all positions, (R,), for logits (N, R), or (N, K).
    """
    head = model.get_output_embeddings()
    rows = head.weight[token_ids]  # (R, H) or (N, K, H)
    is_shared = token_ids.dim() == 1
    logits = hidden @ rows.T if is_shared else (rows @ hidden.unsqueeze(-1)).squeeze(-1)
    bias = getattr(head, "bias", None)
    logits = logits if bias is None else logits + bias[token_ids]
    return scale_logits(logits, *logit_scaling(model.config))


# What the modeling files of transformers 5.23 do to a head's output, by the config's field.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISOR = "logits_scaling"  # Granite, MiniCPM3
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma 2 and later, RecurrentGemma
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # a field of Granite's name, used the other way round
NO_SCALING = ("mpt",)  # has the field `logit_scale`, does not use it


def logit_scaling(config: PreTrainedConfig) -> tuple[float | None, float | None]:
    """Return the factor and the soft cap on a head's output, each None where there is none."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    model_type = getattr(config, "model_type", "")
    if model_type in NO_SCALING:
        return None, None
    factors = [getattr(config, name, None) or 1.0 for name in FACTORS]
    divisor = getattr(config, DIVISOR, None) or 1.0
    is_factor = model_type.startswith(MULTIPLIES_BY_DIVISOR)
    caps = [getattr(config, name, None) for name in CAPS]
    cap = next((cap for cap in caps if cap is not None), None)
    factor = math.prod(factors) * (divisor if is_factor else 1.0 / divisor)
    return None if factor == 1.0 else factor, cap


def scale_logits(
    logits: Tensor, factor: float | Tensor | None, cap: float | Tensor | None
) -> Tensor:
    """Return a head's output times the factor, then squeezed into (-cap, cap)."""
    logits = logits if factor is None else logits * factor
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def require_separable_head(model: nn.Module) -> None:
    """Refuse a model whose logits are not its head's on its last hidden states."""
    token_ids = torch.arange(4, device=model.device)[None]
    own = model(input_ids=token_ids, use_cache=False).logits
    found = logits_of(model, hidden_states(model, token_ids))
    # The same operations in another order differ by about 2**-7 of a logit in bfloat16.
    tolerance = 1e-3 if own.dtype == torch.float32 else 0.05
    if own.shape != found.shape or (own - found).abs().max() > tolerance * own.abs().max():
        raise ValueError(
            f"models of type {model.config.model_type} change their logits after the head in a way "
            "that is not known here; qat.model.head.logit_scaling lists those that are"
        )
