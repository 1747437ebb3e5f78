"""Measure a student, or any model, on a cache, texts or tasks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.cache.read import TeacherCache
from qat.data.text import bos_id, require_known_ids, text_blocks
from qat.evaluate.config import EvaluateConfig
from qat.evaluate.on_cache import evaluate_on_cache
from qat.evaluate.on_text import evaluate_on_text, require_equal_widths
from qat.evaluate.tasks import TaskNumbers, load_tasks, measure_tasks
from qat.evaluate.windows import JOINT
from qat.export.from_gguf import gguf_contents
from qat.export.to_gguf import SUFFIX as GGUF_SUFFIX
from qat.model.checkpoint import bits_per_weight, dense_parts_in
from qat.model.head import require_separable_head
from qat.model.load import load_tokenizer, model_identity, vocabulary_size
from qat.model.surgery import hold_weights
from qat.pipelines.open_cache import open_cache
from qat.pipelines.open_checkpoint import Checkpoint, load_model, open_checkpoint
from qat.pipelines.perplexity import PerplexityResult, read_domains
from qat.pipelines.place import Place
from qat.runtime.distributed import joined
from qat.runtime.launch import num_processes
from qat.runtime.packages import installed_version
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateResult:
    """Held-out numbers of a model; None where one cannot be known."""

    kl_nats: float | None
    """Mean KL(teacher || student) over the whole vocabulary: from a live teacher, or from a cache
    of hidden states."""
    kl_nats_lower: float | None
    """In its place from other caches: of the cached tokens and the rest as one cell, a lower bound;
    from a sampled cache, or one without the rest's mass, an estimate."""
    kl_stderr: float | None
    """Standard error of the mean over sequences."""
    kl_median: float | None
    """Of the KL of single tokens, as are those that follow."""
    kl_p90: float | None
    kl_p95: float | None
    kl_p99: float | None
    kl_p999: float | None
    kl_max: float | None
    kd_loss: float | None
    """The Speedrun Log's loss: temperature 2, cached tokens only."""
    top1_agreement: float | None
    """Share of tokens where both have the same likeliest token."""
    perplexity: float | None
    perplexity_stderr: float | None
    tokens: int
    """Positions that were compared."""
    bits_per_weight: float | None
    """Of quantized layers."""
    bits_per_weight_mlp: float | None
    bits_per_weight_model: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksResult:
    """What a model gets on tasks of lm-eval, with the convention that it is measured by."""

    tasks: dict[str, TaskNumbers]
    """By name, of groups too: lm-eval's metrics and their standard errors; num_fewshot, examples
    measured, version of the task."""
    lm_eval: str | None
    """Version of lm-eval."""
    bos: bool
    """Whether each prompt starts with BOS; none is put into a chat template."""
    bits_per_weight: float | None
    """Of quantized layers."""
    bits_per_weight_mlp: float | None
    bits_per_weight_model: float | None


def evaluate(config: EvaluateConfig) -> EvaluateResult | PerplexityResult | TasksResult:
    """Load a model, measure it, return its numbers."""
    place = Place.of(config)
    device, dtype = place.device, place.dtype
    opened = open_checkpoint(config.checkpoint, model_id=config.model_id)
    if config.perplexity:
        return measure_perplexity(config, opened, place)
    if config.tasks:
        return measure_on_tasks(config, opened, place)
    options = {"device": device.torch_device, "dtype": dtype, "batch_size": config.batch_size}
    require_same_vocabulary(config, opened.text_folder)
    if config.cache_dir is None:
        tokenizer = load_tokenizer(opened.text_folder)
        blocks = text_blocks(config.text, tokenizer, config.seq_len, config.num_sequences)
        require_known_ids(blocks, vocabulary_size(opened.text_folder), str(opened.text_folder))
        num_context = 0 if bos_id(tokenizer) is None else 1
        measure = partial(evaluate_on_text, blocks=blocks, num_context=num_context, **options)
    else:
        cache = open_cache(config.cache_dir, opened.text_folder)
        say_if_other_teacher(config, cache)
        limit = config.num_sequences
        measure = partial(evaluate_on_cache, cache=cache, num_sequences=limit, **options)
    model, sizes = load_with_sizes(opened, dtype)
    teacher = load_model(config.teacher, dtype=dtype)[0] if config.teacher else None
    with joined(device), dense_parts_in(model, dtype), device.hosting(model):
        if teacher is not None:
            device.place(teacher)
        for one in (model, teacher):
            if one is not None and not device.compiles_steps:
                require_separable_head(one)
        return EvaluateResult(**measure(model, teacher=teacher), **sizes)


def measure_perplexity(
    config: EvaluateConfig, opened: Checkpoint, place: Place
) -> PerplexityResult:
    """Return a model's perplexity on each of the texts."""
    tokenizer, stride = load_tokenizer(opened.text_folder), config.used_stride
    domains = read_domains(
        config.perplexity,
        tokenizer,
        window=config.window,
        stride=stride,
        text_column=config.text_column,
    )
    torch_device = place.device.torch_device
    with joined(place.device), formed(opened, place) as (model, sizes):
        if not place.device.compiles_steps:
            require_separable_head(model)
        found = {one.name: one.measure(model, torch_device, is_shared=True) for one in domains}
    return PerplexityResult(
        domains=found,
        window=config.window,
        stride=stride,
        bos=bos_id(tokenizer) is not None,
        joined_by=JOINT,
        **sizes,
    )


def measure_on_tasks(config: EvaluateConfig, opened: Checkpoint, place: Place) -> TasksResult:
    """Return a model's numbers on each of the tasks, whose data is looked up first."""
    if num_processes() > 1:
        raise ValueError(f"--tasks {' '.join(config.tasks)}: call it without torchrun")
    tasks, tokenizer = load_tasks(config.task_names), load_tokenizer(opened.text_folder)
    # Every prompt has another length.
    with formed(opened, Place(place.device.eager(), place.dtype)) as (model, sizes):
        found = measure_tasks(
            model,
            tokenizer,
            tasks,
            num_fewshot=config.num_fewshot,
            num_examples=config.num_sequences,
            batch_size=config.batch_size,
        )
    return TasksResult(
        tasks=found,
        lm_eval=installed_version("lm_eval"),
        bos=bos_id(tokenizer) is not None,
        **sizes,
    )


@contextmanager
def formed(opened: Checkpoint, place: Place) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Give a model on its device, its weights formed once, and its bits per weight."""
    model, sizes = load_with_sizes(opened, place.dtype)
    with dense_parts_in(model, place.dtype), place.device.hosting(model):
        hold_weights(model, place.dtype)
        yield model, sizes


def load_with_sizes(opened: Checkpoint, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model and its bits per weight.

    A student's few dense parts are loaded as they are stored, so that their bits are counted.
    """
    model = opened.load(dtype=torch.float32 if opened.header else dtype)
    sizes = bits_per_weight(model)
    if opened.path.suffix == GGUF_SUFFIX:
        sizes["bits_per_weight_model"] = gguf_contents(opened.path).bits_per_weight
    return model, sizes


def require_same_vocabulary(config: EvaluateConfig, folder: Path) -> None:
    """Refuse a teacher of another vocabulary before anything is loaded."""
    if config.teacher:
        require_equal_widths(
            vocabulary_size(folder), vocabulary_size(open_checkpoint(config.teacher).text_folder)
        )


def say_if_other_teacher(config: EvaluateConfig, cache: TeacherCache) -> None:
    """Say so where the live teacher is not the model that the cache was built with."""
    recorded = cache.manifest.identity.teacher_weights
    if not config.teacher or recorded is None:
        return
    opened = open_checkpoint(config.teacher)
    if opened.header or model_identity(opened.path)["weights"] != recorded:
        say("--teacher is not the cache's: kl_nats is against --teacher, kd_loss the cache's")
