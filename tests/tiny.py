"""Small things made from config classes: models, a tokenizer, folders, texts, caches.

Models have 2 layers and width 64; their vocabulary is wider than the tokenizer's, as padded
ones are. Everything follows from a seed.
"""

import copy
import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 272  # the tokenizer has 261; the rest is padding
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 261 tokens: any text goes through and comes back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(*, tied: bool = True, seed: int = 0, **changes) -> LlamaForCausalLM:
    """Return a random Llama; `changes` go to its config."""
    return _make(LlamaForCausalLM, LlamaConfig, tied=tied, seed=seed, **changes)


def tiny_qwen3(*, tied: bool = True, seed: int = 0, **changes) -> Qwen3ForCausalLM:
    """Return a random Qwen3 (q and k norms); `changes` go to its config."""
    return _make(Qwen3ForCausalLM, Qwen3Config, tied=tied, seed=seed, **changes)


def tiny_gemma(*, tied: bool = True, seed: int = 0, **changes) -> Gemma3ForCausalLM:
    """Return a random Gemma 3 text model (sliding window, scaled embeddings)."""
    changes = {"sliding_window": 16, "query_pre_attn_scalar": 16, **changes}
    return _make(Gemma3ForCausalLM, Gemma3TextConfig, tied=tied, seed=seed, **changes)


TINY_MODELS = {"llama": tiny_llama, "qwen3": tiny_qwen3, "gemma": tiny_gemma}


def _make(model_type, config_type, *, tied, seed, **changes):
    """Build a model whose logits spread enough for KL to mean something."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 258,
        "pad_token_id": 256,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = config_type(**{**sizes, **changes}, tie_word_embeddings=tied)
        model = model_type(config)
    return model.eval().requires_grad_(False)


def tiny_student(family: str = "llama", scheme: str = "q2a4", *, tied: bool = True, **changes):
    """Return a quantized tiny model, uncalibrated; `changes` go to its config."""
    from qat.quant.scheme import scheme_from_name

    found = scheme_from_name(scheme)
    kinds = (found.mlp, found.attention)  # a name has synonyms
    return copy.deepcopy(_student(family, kinds, tied, tuple(changes.items())))


@cache
def _student(family, kinds, tied, changes):
    """Fit a student once a process: most of what a test of one costs."""
    from qat.pipelines.quantize import init_student
    from qat.quant.scheme import Scheme

    student = TINY_MODELS[family](tied=tied, **dict(changes))
    init_student(student, Scheme(name="tiny", mlp=kinds[0], attention=kinds[1]))
    return student


def save_tiny(folder: Path, model, tokenizer=None) -> Path:
    """Write a Hugging Face folder: config.json, model.safetensors, tokenizer files."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return Path(folder)


def save_student(folder: Path, student, text_source: Path, **fields) -> Path:
    """Write a native checkpoint; `fields` go to its header, the scheme's name among them."""
    from qat.model.checkpoint import CheckpointHeader, write_checkpoint
    from qat.quant.scheme import scheme_from_name

    scheme = scheme_from_name(fields.pop("scheme", "q2a4"))
    header = CheckpointHeader(**{"scheme": scheme.to_dict(), "base_model": {}, **fields})
    write_checkpoint(student, header, folder, text_source=text_source)
    return Path(folder)


def tiny_records(count: int = 24, *, seed: int = 0) -> list[dict[str, str]]:
    """Return alpaca records of varied lengths."""
    generator = torch.Generator().manual_seed(seed)
    words = (
        "the",
        "cat",
        "sees",
        "a",
        "red",
        "boat",
        "and",
        "two",
        "small",
        "birds",
        "near",
        "old",
    )

    def sentence(length: int) -> str:
        picks = torch.randint(len(words), (length,), generator=generator).tolist()
        return " ".join(words[pick] for pick in picks)

    lengths = torch.randint(2, 9, (count, 3), generator=generator).tolist()
    return [
        {
            "instruction": sentence(first),
            "input": sentence(second) if second % 2 else "",
            "output": sentence(third),
        }
        for first, second, third in lengths
    ]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """Write one JSON value a line."""
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return Path(path)


def tiny_cache(folder: Path, teacher=None, **changes) -> Path:
    """Build a cache of tiny records and return its folder.

    Args:
        folder: Where the cache's own folder is made.
        teacher: A model; `tiny_llama()` when not given.
        changes: Fields of `BuildCacheConfig` (seq_len, top_k, content, ...).
    """
    from qat.cache.config import BuildCacheConfig
    from qat.cli.build_cache import build

    folder = Path(folder)
    teacher_folder = save_tiny(folder / "teacher", teacher or tiny_llama())
    data = write_jsonl(folder / "records.jsonl", tiny_records())
    settings = {
        "teacher": str(teacher_folder),
        "data": str(data),
        "output_dir": folder,
        "seq_len": 16,
        "batch_size": 4,
        "device": "cpu",
        "dtype": "fp32",
    }
    if changes.get("content") != "hidden":
        settings["top_k"] = 8
    return Path(build(BuildCacheConfig(**{**settings, **changes}))["cache"])
