"""The keys of a GGUF file: the model's sizes and positions, its tokenizer, the file's type."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qat.export.gguf_vocabulary import Vocabulary
from qat.grids.blocks import BLOCK_TYPES

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type to gguf's name
QUANTIZATION_VERSION = 2
# Runtimes refuse a file without merges. This one, of two zero bytes, changes no text: what it
# makes is no token, so it falls back to the bytes.
NO_MERGES = ["\u0100 \u0100"]


def architecture_of(config: PreTrainedConfig) -> str:
    """Return the `gguf` package's name of a model family; refuse one that files cannot tell of."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model type {kind} has no tensor map here; gguf is written for "
            f"{', '.join(ARCHITECTURES)}: export --to hf and use the runtime's own converter"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"runtimes compute {kind} with silu, the model has {config.hidden_act}")
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "yarn", "llama3"):
        raise ValueError(f"rope type {rope} has no GGUF key here; export --to hf")
    return ARCHITECTURES[kind]


def start_file(
    path: Path, config: PreTrainedConfig, vocabulary: Vocabulary, file_type: int
) -> "GGUFWriter":
    """Return a writer that has the model's and the tokenizer's keys."""
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture_of(config)]])
    # gguf 0.19.0 lacks Q2_0; with its sizes known it writes the type by its number.
    gguf.constants.GGML_QUANT_SIZES.setdefault(
        BLOCK_TYPES["q2_0"].number,
        (BLOCK_TYPES["q2_0"].num_weights, BLOCK_TYPES["q2_0"].num_bytes),
    )
    writer.add_name(getattr(config, "name_or_path", "") or config.model_type)
    add_sizes(writer, config)
    add_rope(writer, config)
    add_tokenizer(writer, vocabulary)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(file_type)
    return writer


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_sizes(writer: "GGUFWriter", config: PreTrainedConfig) -> None:
    """Write the model's sizes."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_rope(writer: "GGUFWriter", config: PreTrainedConfig) -> None:
    """Write how positions turn heads."""
    import gguf

    rope = config.rope_parameters
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """Return what Llama 3 divides each frequency by, (half a head,); None for other kinds.

    Source: transformers 5.23, modeling_rope_utils.py, the llama3 parameters.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    width = head_dim_of(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2).double() / width)
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for quick frequencies: kept
    return (1 / ((1 - smooth) / factor + smooth)).float()


def add_tokenizer(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    """Write the tokenizer."""
    writer.add_tokenizer_model("gpt2")  # the format's name of byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges or NO_MERGES)
    for name, index in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
