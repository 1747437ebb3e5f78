"""Small things made from config classes: models, a tokenizer, folders, texts, caches.

Models have 2 layers and width 64; their vocabulary is wider than the tokenizer's, as padded
ones are. Everything follows from a seed.
"""

import copy
import json
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let a tokenizer begin every text with <|endoftext|>, as Gemma's and Llama 3's do."""
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A",
        special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)],
    )
    return tokenizer


def tiny_llama(*, tied: bool = True, seed: int = 0, **changes) -> LlamaForCausalLM:
    """Return a random Llama; `changes` go to its config."""
    return tiny_model("llama", tied=tied, seed=seed, **changes)


def tiny_qwen3(*, tied: bool = True, seed: int = 0, **changes) -> Qwen3ForCausalLM:
    """Return a random Qwen3 (q and k norms); `changes` go to its config."""
    return tiny_model("qwen3", tied=tied, seed=seed, **changes)


def tiny_gemma(*, tied: bool = True, seed: int = 0, **changes) -> Gemma3ForCausalLM:
    """Return a random Gemma 3 text model (sliding window, scaled embeddings)."""
    return tiny_model("gemma3", tied=tied, seed=seed, **changes)


TINY_MODELS = {"llama": tiny_llama, "qwen3": tiny_qwen3, "gemma": tiny_gemma}
# Each family, and a head of its own or tied to the embedding, without all of their pairs.
FAMILY_TIED = [("llama", True), ("llama", False), ("qwen3", False), ("gemma", True)]


SLIDING = {"sliding_window": 16, "query_pre_attn_scalar": 16}
# Family to the classes' first name in transformers and what its config needs to differ.
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),  # biases in attention
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {}),
    "smollm3": ("SmolLM3", {}),
    "gemma2": ("Gemma2", {**SLIDING, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", SLIDING),
    "phi": ("Phi", {}),  # a bias in the head
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
}


def tiny_model(family: str, *, tied: bool = True, seed: int = 0, **changes) -> PreTrainedModel:
    """Return a random model of a family, whose logits spread enough for KL to mean something."""
    return copied(_model(family, tied, seed, json.dumps(changes, default=str)))


def copied(model):
    """Return a copy of a model; that of its config, an object of many parts, is not deep."""
    config = copy.copy(model.config)
    config.__dict__ = {name: copy.copy(value) for name, value in model.config.__dict__.items()}
    return copy.deepcopy(model, {id(model.config): config})


@cache
def _model(family, tied, seed, changes):
    """Make a model once a process: a copy takes half as long."""
    name, own = FAMILIES[family]
    config_type = getattr(transformers, f"{name}TextConfig", None) or getattr(
        transformers, f"{name}Config"
    )
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
        config = config_type(**{**sizes, **own, **json.loads(changes)}, tie_word_embeddings=tied)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model.eval().requires_grad_(False)


def tiny_student(family: str = "llama", plan: str = "q2a4", *, tied: bool = True, **changes):
    """Return a quantized tiny model, uncalibrated; `changes` go to its config."""
    return copied(_student(family, plan, tied, tuple(changes.items())))


@cache
def _student(family, plan, tied, changes):
    """Fit a student once a process: most of what a test of one costs."""
    return quantize_plainly(TINY_MODELS[family](tied=tied, **dict(changes)), plan)


def moved_student(family="llama", plan="deploy", **changes):
    """Return a student whose indices follow latent weights that training moved."""
    from qat.model.surgery import quantized_layers, thaw_indices

    student = tiny_student(family, plan, **changes)
    for layer in list(quantized_layers(student).values())[::2]:
        if not layer.spec.rank:
            thaw_indices(layer)
            layer.latent_weight.data += 0.02 * torch.randn_like(layer.latent_weight)
    return student


# What a fit tries, and what is enough for a student that no test asks to be a good one.
QUICK_FITS = {
    "qat.grids.search": {
        "LARGEST_FACTORS": (1.0,),
        "SEARCH_FACTORS": (1.0,),
        "FINE_STEPS": (0.0,),
        "AFFINE_FACTORS": (1.0,),
        "AFFINE_STEPS": (),
    },
    "qat.grids.codebook": {"COARSE_BINS": 64, "polish": lambda _points, _counts, centers: centers},
    "qat.quant.fit_blocks": {"FEWER_SAMPLES": 6},
    "qat.quant.scale_curves": {"TOP_SHARES": (1.0,)},
    "qat.quant.fit_integers": {"WINDOW": 1, "NUDGES": 1, "NEAR": 1},
}


@contextmanager
def quick_fits():
    """Let fits try one scale each: a tenth of the time, for students a little further away."""
    with pytest.MonkeyPatch.context() as patch:
        for module, values in QUICK_FITS.items():
            for name, value in values.items():
                patch.setattr(import_module(module), name, value)
        patch.setitem(import_module("qat.quant.fit").fit_weight.__kwdefaults__, "num_rounds", 1)
        yield


def quantize_plainly(model, plan: str):
    """Return a model quantized in place, every weight counted alike, by quick fits."""
    from qat.model.surgery import dense_weights
    from qat.pipelines.fit_layers import FitTask, fit_with_moments

    found = plan_of(model, plan)
    modules = dense_weights(model, found)
    task = FitTask(
        specs=found.quantized, weight_of=lambda name: modules[name].weight, row_weights={}
    )
    task.check()
    with quick_fits():
        fit_with_moments(model, task, None)
    return model


def plan_of(model, plan: str = "q2a4"):
    """Return a plan for a model, dense or quantized."""
    from qat.model.surgery import model_tensors
    from qat.quant.plan import read_plan

    return read_plan(plan, model_tensors(model))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes within the block."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and look at what it returns."""
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                # An operation may return what it was given, such as a weight.
                is_given = any(tensor is given for given in tree_leaves([args, kwargs]))
                size = 0 if is_given else tensor.numel() * tensor.element_size()
                self.num_bytes = max(self.num_bytes, size)
        return made


def others_later(values):
    """Return parameters of a test: the first in the fast tier, the others in the recipe tier."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.recipe) for value in others)]


def unpack_words(words, bits, num_inputs):
    """Return the unsigned codes of 32-bit words, one at a time."""
    rows = []
    for row in words.view(torch.int32).numpy().view(np.uint32).tolist():
        stream = sum(word << (32 * place) for place, word in enumerate(row))
        rows.append([(stream >> (bits * j)) & (2**bits - 1) for j in range(num_inputs)])
    return torch.tensor(rows)


def save_tiny(folder: Path, model, tokenizer=None) -> Path:
    """Write a Hugging Face folder: config.json, model.safetensors, tokenizer files."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return Path(folder)


def save_student(folder: Path, student, text_source: Path, plan: str = "q2a4", **fields) -> Path:
    """Write a native checkpoint of a student of a plan; `fields` go to its header."""
    from qat.model.checkpoint import CheckpointHeader, write_checkpoint

    header = CheckpointHeader(
        **{"plan": plan_of(student, plan).to_dict(), "base_model": {}, **fields}
    )
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
    from qat.pipelines.build_cache import build_cache

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
    return build_cache(BuildCacheConfig(**{**settings, **changes})).cache


def tiny_shards(folder: Path, **changes) -> Path:
    """Tokenize tiny records and return the folder of shards.

    Args:
        folder: Where data, tokenizer and shards go.
        changes: Fields of `TokenizeConfig`.
    """
    from qat.data.config import TokenizeConfig
    from qat.pipelines.tokenize_text import tokenize

    folder = Path(folder)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    settings = {
        "data": str(write_jsonl(folder / "records.jsonl", tiny_records(60))),
        "tokenizer": str(folder / "tokenizer"),
        "output_dir": folder / "shards",
        "heldout_ratio": 0.2,
        "shard_tokens": 2000,
    }
    return Path(tokenize(TokenizeConfig(**{**settings, **changes})).shards)


QUESTIONS = [
    {"question": f"the {thing} sees", "choices": ["a red boat", "two birds", "it"], "label": label}
    for thing, label in zip(("cat", "dog", "bird", "boat", "old man"), (0, 2, 1, 1, 0), strict=True)
]


def tiny_task(folder: Path) -> Path:
    """Write `QUESTIONS` as a task of lm-eval, animals, and return its YAML file."""
    data = write_jsonl(folder / "questions.jsonl", QUESTIONS)
    file = folder / "animals.yaml"
    file.write_text(
        f"""task: animals
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}, train: {data}}}
  cache_dir: {folder / "cache"}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 3.0
"""
    )
    return file


def random_tensor(name, *, seed=0, rows=3, blocks=2):
    """Return a weight of GGUF type `name`: all indices, scales of either sign where there are."""
    from qat.quant.quantized_tensor import QuantizedTensor
    from qat.quant.spec import FORMATS

    spec, generator = FORMATS[f"gguf:{name}"], torch.Generator().manual_seed(seed)
    shape = (rows, blocks * spec.group_size)
    indices = torch.randint(spec.grid.num_values, shape, generator=generator, dtype=torch.uint8)
    size = 10.0 ** (seed % 5 - 3)
    parts = {
        part: spec.snap_part(part, torch.randn(rows, blocks, generator=generator) * size)
        for part in spec.scale.part_shapes(shape)
    }
    return QuantizedTensor(spec, indices, {**parts, "codebook": spec.grid.start_codebook()})
