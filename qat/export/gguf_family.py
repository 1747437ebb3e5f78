"""Model families that GGUF runtimes compute, and what of a config they cannot express.

A runtime knows a family by its name and takes much of it for granted: which activation, which
layers slide or have no positions, whether the head is the embedding. A config that says otherwise
would load and answer wrongly, so it is refused before anything is written.

Source: llama.cpp of 2026-10, load_arch_hparams and load_arch_tensors of each file in src/models.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

from qat.tracking.messages import say

REMEDY = "export --to hf and use the runtime's own converter"
ANY_BIAS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How runtimes compute a family."""

    name: str
    """As the `gguf` package spells it."""
    activation: str = "silu"
    turns_neighbours: bool = False
    """Whether positions turn neighbouring rows of a head together, not its two halves."""
    norm_offset: float = 0.0
    """What the model adds to the weight of its norms; the file holds the sum."""
    has_windows: bool = False
    """Whether each layer's sliding window is kept."""
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    can_turn_part: bool = False
    """Whether positions may turn only the front of a head."""
    needs_plain_heads: bool = False
    """Whether the heads together are as wide as the hidden state."""
    ties: tuple[bool, ...] = (True, False)
    """Whether the head may be the embedding."""
    biases: tuple[str, ...] = ANY_BIAS[:3]
    scaled_by_width_at: int = 0
    """Number of layers of the one size whose queries are scaled by hidden size over heads."""


FACTORS = ("default", "linear", "yarn", "llama3", "longrope")
LLAMA = Family(name="LLAMA", turns_neighbours=True, rope_types=FACTORS, biases=ANY_BIAS)
GEMMA = {"activation": "gelu_pytorch_tanh", "norm_offset": 1.0, "has_windows": True}
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family(name="QWEN2"),
    "qwen3": Family(name="QWEN3"),
    "smollm3": Family(name="SMOLLM3", turns_neighbours=True),
    "granite": Family(name="GRANITE", turns_neighbours=True, rope_types=FACTORS, biases=ANY_BIAS),
    "phi3": Family(
        name="PHI3", rope_types=FACTORS, can_turn_part=True, needs_plain_heads=True, biases=()
    ),
    "olmo2": Family(name="OLMO2", needs_plain_heads=True, ties=(False,)),
    "gemma2": Family(name="GEMMA2", ties=(True,), scaled_by_width_at=46, **GEMMA),
    "gemma3_text": Family(
        name="GEMMA3", scaled_by_width_at=62, rope_types=("default", "linear"), **GEMMA
    ),
}


def require_family(config: PreTrainedConfig, sources: Iterable[str] = ()) -> Family:
    """Return a config's family; refuse one that runtimes cannot compute as the model does.

    Args:
        config: Of the model.
        sources: Names of its tensors; biases among them are checked.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"model type {kind} has no tensor map here; gguf is written for "
            f"{', '.join(FAMILIES)}: {REMEDY}"
        )
    family = FAMILIES[kind]
    for reason in differences(config, family, sources):
        raise ValueError(f"GGUF runtimes compute {kind} {reason}; {REMEDY}")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and not family.has_windows:
        say(f"runtimes ignore {kind}'s sliding window: beyond {window} tokens answers differ")
    return family


def differences(config: PreTrainedConfig, family: Family, sources: Iterable[str]) -> Iterator[str]:
    """Yield how a model differs from what runtimes compute for its family."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        yield f"with {family.activation}, the model has hidden_act={activation}"
    if config.tie_word_embeddings not in family.ties:
        yield f"with tie_word_embeddings={family.ties[0]}, the model has another head"
    width, heads = head_dim_of(config), config.num_attention_heads
    if family.needs_plain_heads and width * heads != config.hidden_size:
        yield f"with heads of {config.hidden_size // heads} weights, the model has head_dim={width}"
    for source in sources:
        owner, part = source.split(".")[-2:]
        if part == "bias" and owner not in family.biases:
            yield f"without {source}"
    yield from rope_differences(config, family)
    if family.has_windows:
        yield from gemma_differences(config, family)
    if config.model_type == "smollm3":
        pattern = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != pattern:
            yield f"with no positions in each 4th layer, the model has {config.no_rope_layers}"


def rope_differences(config: PreTrainedConfig, family: Family) -> Iterator[str]:
    """Yield how a model's positions differ from its family's."""
    rope = rope_of(config)
    if rope["rope_type"] not in family.rope_types:
        yield f"with rope types {', '.join(family.rope_types)}, not rope type {rope['rope_type']}"
    sliding = config.rope_parameters.get("sliding_attention", {"rope_type": "default"})
    if sliding["rope_type"] != "default":
        yield f"with rope type default in sliding layers, not {sliding['rope_type']}"
    if not rope.get("truncate", True):
        yield "with yarn's range in whole dimensions, the model has truncate=False"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not family.can_turn_part:
        part = rope["partial_rotary_factor"]
        yield f"with positions of whole heads, the model has partial_rotary_factor={part}"


def gemma_differences(config: PreTrainedConfig, family: Family) -> Iterator[str]:
    """Yield how a model's attention differs from its family's."""
    width = head_dim_of(config)
    if config.num_hidden_layers == family.scaled_by_width_at:
        width = config.hidden_size // config.num_attention_heads
    if not math.isclose(config.query_pre_attn_scalar, width):
        scalar = config.query_pre_attn_scalar
        yield f"with query_pre_attn_scalar={width}, the model has {scalar}"
    has_caps = config.model_type == "gemma2"
    if bool(config.attn_logit_softcapping) != has_caps:
        yield f"otherwise than with attn_logit_softcapping={config.attn_logit_softcapping}"
    if has_caps and not config.final_logit_softcapping:
        yield "with final_logit_softcapping, the model has none"
    if getattr(config, "use_bidirectional_attention", False):
        yield "with causal attention, the model has use_bidirectional_attention=True"


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: PreTrainedConfig) -> dict[str, object]:
    """Return how positions turn heads, in the layers that see everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)
