"""What every pipeline that makes a student shares: open its cache, measure, write, report."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qat.cache.read import TeacherCache
from qat.evaluate.on_cache import evaluate_on_cache
from qat.legacy.student import write_seed_checkpoint
from qat.model.checkpoint import (
    CheckpointHeader,
    bits_per_weight,
    dense_parts_in,
    write_checkpoint,
)
from qat.model.load import load_tokenizer, vocabulary_size
from qat.model.surgery import model_tensors, release_weights
from qat.pipelines.open_cache import open_teacher_cache
from qat.pipelines.open_checkpoint import latent_or_base_weights, load_model, open_checkpoint
from qat.pipelines.quantize_config import SEED_SUFFIX, require_other
from qat.pipelines.recipe import finished, recipe
from qat.quant.plan import QuantPlan, plan_from_dict
from qat.runtime.device import Device
from qat.runtime.memory import peak_rss_bytes
from qat.storage.files import write_json
from qat.tracking.messages import say
from qat.tracking.record import SUMMARY, kl_name

Numbers = dict[str, float | int | None]
Change = Callable[[nn.Module, QuantPlan], tuple[QuantPlan, Numbers]]
Write = Callable[[nn.Module, CheckpointHeader, Path], None]


@dataclass(frozen=True, slots=True)
class StudentResult:
    """A student that was made, or found made."""

    checkpoint: Path
    """Native folder, or `.pt` file in the seeds' form."""
    metrics: Numbers
    """Bits per weight, seconds, peak_rss_bytes; with a cache kl_nats and what else it measures."""

    def to_json(self) -> dict[str, Any]:
        """Return the values of the closing line."""
        return {"checkpoint": str(self.checkpoint), **self.metrics}


class ChangeConfig(Protocol):
    """What the commands that change a student are told."""

    output: Path
    model_id: str | None
    cache_dir: Path | None
    dtype: str
    device: str


def open_cache(
    folder: Path | None,
    tokenizer: PreTrainedTokenizerBase | str | Path,
    vocab_size: int | None,
    weights: str | None = None,
) -> TeacherCache | None:
    """Return the cache in a folder, refused unless it is of this tokenizer and teacher.

    Args:
        folder: None gives None.
        tokenizer: Or the folder of one, not read where the cache says nothing of its tokenizer.
        vocab_size: Width of the model's logits; None is not compared.
        weights: Hash of the full-precision model's weights; None is not compared.
    """
    if folder is None:
        return None
    cache = open_teacher_cache(folder)
    identity = cache.manifest.identity
    if identity.tokenizer_sha256 or identity.template_sha256:
        is_folder = isinstance(tokenizer, (str, Path))
        cache.require_tokenizer(load_tokenizer(tokenizer) if is_folder else tokenizer)
    if vocab_size is not None:
        cache.require_vocabulary(vocab_size)
    cache.require_teacher(weights)
    return cache


def measure_and_write(
    model: nn.Module,
    header: CheckpointHeader,
    output: Path,
    *,
    cache: TeacherCache | None,
    write: Write,
    started: float,
    device: Device,
    dtype: torch.dtype,
) -> StudentResult:
    """Measure a student on a cache if there is one, write it, return the result."""
    seconds = time.perf_counter() - started
    values = bits_per_weight(model) | measure(model, cache, device, dtype)
    values |= {"seconds": round(seconds, 2), "peak_rss_bytes": peak_rss_bytes()}
    write(model, replace(header, metrics=values), output)
    return StudentResult(output, values)


def change_student(
    command: str,
    config: ChangeConfig,
    checkpoint: Path,
    change: Change,
    *,
    is_float16: bool = False,
) -> StudentResult:
    """Change a student, with its numbers before and after.

    Args:
        command: As typed.
        config: Of the command.
        checkpoint: The student.
        change: Changes the student in place; returns its plan and numbers for the result.
        is_float16: Whether every number that is written is a float16 one.

    Raises:
        ValueError: If the checkpoint is no student.
    """
    started = time.perf_counter()
    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    say(device.describe())
    opened = open_checkpoint(checkpoint, model_id=config.model_id)
    require_other("the checkpoint that is read", opened.path, config.output)
    header = opened.header
    if header is None:
        raise ValueError(f"{checkpoint} is a full-precision model; `qat {command}` takes a student")
    text_folder, weights = opened.text_folder, header.base_model.get("weights")
    cache = open_cache(config.cache_dir, text_folder, vocabulary_size(text_folder), weights)
    made_by = recipe(command, config, student=header.sha256, cache=cache and cache.fingerprint)
    if (done := finished(config.output, made_by)) is not None:
        return already_made(config.output, done)
    student, _header = load_model(opened.path, model_id=config.model_id)
    before = measure(student, cache, device, dtype)
    plan, changed = change(student, plan_from_dict(header.plan, model_tensors(student)))
    weight_of = latent_or_base_weights(opened)

    def write(model: nn.Module, header: CheckpointHeader, output: Path) -> None:
        header.metrics.update(changed | cost(before, header.metrics))  # the result's as well
        write_student(
            model,
            header,
            output,
            text_source=text_folder,
            weight_of=weight_of,
            is_float16=is_float16,
        )

    return measure_and_write(
        student,
        replace(header, plan=plan.to_dict(), made_by=made_by),
        config.output,
        cache=cache,
        write=write,
        started=started,
        device=device,
        dtype=dtype,
    )


def cost(before: Numbers, after: Numbers) -> Numbers:
    """Return what a change did to the distance from the teacher, where it was measured."""
    name = kl_name(before)
    if name is None:
        return {}
    return {f"{name}_before": before[name], f"{name}_cost": after[name] - before[name]}


def measure(
    model: nn.Module, cache: TeacherCache | None, device: Device, dtype: torch.dtype
) -> Numbers:
    """Return a student's numbers on a cache, none without one; the student ends on the CPU."""
    if cache is None:
        return {}
    with dense_parts_in(model, dtype), device.hosting(model):
        values = evaluate_on_cache(model, cache, device=device.torch_device, dtype=dtype)
        release_weights(model)
    return values


def write_student(
    model: nn.Module,
    header: CheckpointHeader,
    output: Path,
    *,
    text_source: Path,
    weight_of: Callable[[str], Tensor | None] | None = None,
    is_float16: bool = False,
) -> None:
    """Write a student as its output's name asks: the seeds' form for .pt, else a native folder.

    Args:
        model: The student.
        header: Filled in.
        output: File or folder.
        text_source: Folder of the tokenizer.
        weight_of: Weight that a layer was fitted to, by name, for a form that keeps it.
        is_float16: Whether every number is to be a float16 one.
    """
    if output.suffix == SEED_SUFFIX:
        notes = {
            "base_model": header.base_model,
            "cache_fingerprint": header.cache_fingerprint,
            "made_by": header.made_by,
            "metrics": header.metrics,
        }
        write_seed_checkpoint(
            model,
            output,
            model_id=header.base_model["path"],
            weight_of=weight_of,
            notes=notes,
            is_float16=is_float16,
        )
        return
    write_checkpoint(model, header, output, text_source=text_source)
    write_json(output / SUMMARY, header.metrics)  # so that `qat compare` shows it among the runs


def already_made(output: Path, metrics: Numbers) -> StudentResult:
    """Return the result of a student that this recipe has made before."""
    say(f"{output} is already complete: nothing to do")
    return StudentResult(output, metrics)
