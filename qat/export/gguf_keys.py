"""The keys of a GGUF file: the model's sizes and positions, its tokenizer, the file's type."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qat.export.gguf_family import FAMILIES, head_dim_of, rope_of
from qat.export.gguf_vocabulary import Vocabulary
from qat.grids.blocks import BLOCK_TYPES

if TYPE_CHECKING:
    from gguf import GGUFWriter

QUANTIZATION_VERSION = 2
HEADS = ("model.embed_tokens.weight", "lm_head.weight")
MULTIPLIERS = {  # a config's name to the writer's
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Runtimes refuse a file without merges. This one, of two zero bytes, changes no text: what it
# makes is no token, so it falls back to the bytes.
NO_MERGES = ["\u0100 \u0100"]


class PlannedTensor(NamedTuple):
    """One tensor of the file to be: where it comes from, its name, type and shape there."""

    source: str
    name: str
    type_name: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        kind = BLOCK_TYPES[self.type_name]
        return math.prod(self.shape) // kind.num_weights * kind.num_bytes + kind.tail_bytes


def write_head(
    path: Path, config: PreTrainedConfig, vocabulary: Vocabulary, tensors: list[PlannedTensor]
) -> None:
    """Write all of a file that comes before its data: keys, tokenizer, and where tensors lie.

    Tensors of positions (`rope_tensors`) follow those that are given.
    """
    import gguf

    family = FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.name]])
    # gguf 0.19.0 lacks Q2_0; with its sizes known it writes the type by its number.
    gguf.constants.GGML_QUANT_SIZES.setdefault(
        BLOCK_TYPES["q2_0"].number,
        (BLOCK_TYPES["q2_0"].num_weights, BLOCK_TYPES["q2_0"].num_bytes),
    )
    writer.add_name(file_title(config, vocabulary))
    add_sizes(writer, config)
    add_multipliers(writer, config)
    add_rope(writer, config)
    add_tokenizer(writer, vocabulary)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(main_file_type(tensors))
    positions = [
        PlannedTensor("", name, "f32", tuple(factors.shape))
        for name, factors in rope_tensors(config).items()
    ]
    for tensor in (*tensors, *positions):
        number = BLOCK_TYPES[tensor.type_name].number
        dtype = np.dtype(np.float32)  # which the writer reads the shape by, given a number
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.num_bytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def file_title(config: PreTrainedConfig, vocabulary: Vocabulary) -> str:
    """Return the model's name for a file: its family, so that a plan knows its length.

    Where a name contains phi3, llama.cpp drops white space after control tokens, as Phi 3's
    tokenizer does, and expects its tokens.
    """
    if config.model_type != "phi3":
        return config.model_type
    expected = {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= set(vocabulary.tokens)
    return "phi3" if vocabulary.strips_after_control and expected else "phi 3"


def main_file_type(tensors: list[PlannedTensor]) -> int:
    """Return the file type of what most matrices of the decoder layers are."""
    types = [t.type_name for t in tensors if t.source not in HEADS and t.type_name != "f32"]
    types = types or [t.type_name for t in tensors]
    return BLOCK_TYPES[max(sorted(set(types)), key=types.count)].file_type


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


def add_multipliers(writer: "GGUFWriter", config: PreTrainedConfig) -> None:
    """Write what Granite multiplies by, and where Gemma caps logits and slides its window."""
    values = {name: getattr(config, name, None) for name in MULTIPLIERS}
    for name, key in MULTIPLIERS.items():
        if values[name] is not None:
            getattr(writer, f"add_{key}")(values[name])
    if config.model_type == "phi3":  # some runtimes do not load a file without it
        writer.add_sliding_window(config.sliding_window or 0)
    if FAMILIES[config.model_type].has_windows:
        writer.add_sliding_window(config.sliding_window or 0)
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_sliding_window_pattern(slides)


def add_rope(writer: "GGUFWriter", config: PreTrainedConfig) -> None:
    """Write how positions turn heads."""
    import gguf

    rope = rope_of(config)
    writer.add_rope_dimension_count(rope_width(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    sliding = config.rope_parameters.get("sliding_attention")
    if sliding is not None:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        _frequencies, factor = scaled_frequencies(config)
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
            writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
            factor /= 1 + 0.1 * math.log(rope["factor"])  # which runtimes multiply by themselves
        writer.add_rope_scaling_attn_factors(factor)


def rope_width(config: PreTrainedConfig) -> int:
    """Return how many weights of a head positions turn."""
    return int(head_dim_of(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def scaled_frequencies(config: PreTrainedConfig) -> tuple[Tensor, float]:
    """Return a kind's frequencies, (half a head,), and what it multiplies sines by."""
    return ROPE_INIT_FUNCTIONS[rope_of(config)["rope_type"]](config, torch.device("cpu"))


def rope_tensors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return what frequencies are divided by, (half a head,), by name in the file."""
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        steps = torch.arange(0, rope_width(config), 2).float() / rope_width(config)
        frequencies, _factor = scaled_frequencies(config)
        return {"rope_freqs.weight": rope["rope_theta"] ** -steps / frequencies}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]).float()
            for kind in ("long", "short")
        }
    return {}


def add_tokenizer(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    """Write the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges or NO_MERGES)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_remove_extra_whitespaces(False)
    for name, index in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
