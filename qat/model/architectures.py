"""Models that do not exist yet: Llama shapes by name, or any config.json, with random weights.

Shape legend of `SHAPES`: widths are multiples of 256 where a runtime's super-blocks of 256 weights
shall hold every linear.
"""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from qat.model.attention import widen_attention
from qat.model.checkpoint import empty_model_of, read_model_config
from qat.model.factorized import EMBEDDING_RANK, factorize_embedding
from qat.storage.decode import reading

# By name: fields of LlamaConfig. Embedding and head are one matrix where nothing else is said.
SHAPES: dict[str, dict[str, int | float | bool]] = {
    # 15,208,960 parameters.
    "tiny-15m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    },
    # 200,573,952 parameters.
    "medium-200m": {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 2560,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    # 1,500,088,320 parameters. The plan asks for 24 to 28 layers, heads of 128, grouped keys and
    # values, a feed-forward width near four times the hidden one (3.75 here), 32,000 tokens.
    "plan-1.5b": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 7680,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
    # 3,325,627,392 parameters. Its document says 3,244,343,296; every tensor of the shape has a
    # side of 3072, of which that is no multiple.
    "kisoku-3.2b": {
        "vocab_size": 50_304,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    },
    # 273,284,480 parameters: 25,682,560 in the embedding, of rank 128 as its document says, and
    # 128,003,200 in the head. The document says 197M and 270M.
    "yxanul-197m": {
        "vocab_size": 200_005,
        "hidden_size": 640,
        "intermediate_size": 1712,
        "num_hidden_layers": 28,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        EMBEDDING_RANK: 128,
    },
}
ROPE_BASE = 10_000.0


def read_architecture(name: str, vocab_size: int | None = None) -> PreTrainedConfig:
    """Return the config of a shape by name, of a config.json, or of the folder of one.

    Args:
        name: As `SHAPES` has it, or a path.
        vocab_size: Rows of the embedding; the shape's own when not given.

    Raises:
        ValueError: If there is no such shape, or the file is no config of a causal model.
    """
    path = Path(name)
    if name in SHAPES:
        config = LlamaConfig(
            **{"rms_norm_eps": 1e-5, "tie_word_embeddings": True, **SHAPES[name]},
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        )
    elif path.is_file() or (path / "config.json").is_file():
        config = read_model_config(path)
    else:
        raise ValueError(
            f"--arch {name} is not one of {', '.join(SHAPES)}, and no config.json is there; name "
            "one of them, or a folder that has one"
        )
    if vocab_size is not None:
        config.get_text_config().vocab_size = vocab_size
    return config


def new_model(config: PreTrainedConfig) -> nn.Module:
    """Return a model of random float32 weights, as torch's generator draws them, to be trained.

    Its embedding is factorized where the config has a rank for it.
    """
    config, rank = without_rank(config)
    with reading(f"{config.name_or_path or config.model_type}/config.json"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    if rank is not None:
        factorize_embedding(model, rank)
    widen_attention(model)
    return model


def without_rank(config: PreTrainedConfig) -> tuple[PreTrainedConfig, int | None]:
    """Return a config that says nothing of factors, and the rank of its embedding or None."""
    config = copy.deepcopy(config)
    rank = getattr(config, EMBEDDING_RANK, None)
    if hasattr(config, EMBEDDING_RANK):
        delattr(config, EMBEDDING_RANK)
    return config, rank


def count_parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the parameters of a config's model, and those in its embedding; tied ones once."""
    config, rank = without_rank(config)
    model = empty_model_of(config, device="meta")
    if rank is not None:
        factorize_embedding(model, rank)
    embedding = model.get_input_embeddings()
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, embedding)]
    return counts[0], counts[1]
