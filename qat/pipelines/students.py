"""The last stretch of every command that makes a student: measure, write, report."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qat.tracking.messages import say


def open_cache(
    folder: Path | None, tokenizer: Any, vocab_size: int | None, weights: str | None = None
) -> Any:
    """Return the cache in a folder, refused unless it is of this tokenizer and teacher.

    Args:
        folder: None gives None.
        tokenizer: Or the folder of one, not read where the cache says nothing of its tokenizer.
        vocab_size: Width of the model's logits; None is not compared.
        weights: Hash of the full-precision model's weights; None is not compared.
    """
    from qat.model.load import load_tokenizer
    from qat.pipelines.open_cache import open_teacher_cache

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


def calibrate(model: Any, linears: Any, cache: Any, count: int, device: Any) -> Any:
    """Return the second moments of each linear's inputs on a cache; None without one."""
    from qat.calibrate.statistics import collect_second_moments
    from qat.pipelines.recipe import calibration_batches

    if cache is None:
        say("no --cache-dir: every weight counts alike, which costs most of a 2-bit student")
        return None
    batches = (batch.to(device.torch_device) for batch in calibration_batches(cache, count))
    with device.hosting(model):
        moments = collect_second_moments(model, linears, batches)
    return {name: moment.cpu() for name, moment in moments.items()}


def calibration_tokens(cache: Any, count: int, device: Any) -> list[Any]:
    """Return the token ids that calibrate, in batches on the device."""
    from qat.pipelines.recipe import calibration_batches

    return [batch.to(device.torch_device) for batch in calibration_batches(cache, count)]


def loss_weights(fit: str, model: Any, names: Any, batches: list[Any]) -> Any:
    """Return how much each token counts for each linear of a guided fit; None for the others."""
    from qat.calibrate.statistics import collect_loss_weights

    return collect_loss_weights(model, names, batches) if fit == "guided" else None


def measure_and_write(
    model: Any,
    header: Any,
    output: Path,
    *,
    cache: Any,
    write: Callable[[Any, Any, Path], None],
    started: float,
    device: Any,
    dtype: Any,
) -> dict[str, Any]:
    """Measure a student on a cache if there is one, write it, return the closing values."""
    from qat.model.checkpoint import bits_per_weight
    from qat.runtime.memory import peak_rss_bytes

    seconds = time.perf_counter() - started
    values = bits_per_weight(model) | measure(model, cache, device, dtype)
    values |= {"seconds": round(seconds, 2), "peak_rss_bytes": peak_rss_bytes()}
    write(model, replace(header, metrics=values), output)
    return {"checkpoint": str(output), **values}


def reform(
    command: str,
    config: Any,
    checkpoint: Path,
    new_scheme: Callable[[Any], Any],
    change: Callable[[Any], dict[str, Any]],
    *,
    is_float16: bool = False,
) -> dict[str, Any]:
    """Change a student without fitting it anew, with its numbers before and after.

    Args:
        command: As typed.
        config: With output, model_id, cache_dir, dtype and device.
        checkpoint: The student.
        new_scheme: From the scheme before to that after.
        change: Changes the student in place, returns numbers for the closing line.
        is_float16: Whether every number that is written is a float16 one.

    Raises:
        ValueError: If the checkpoint is no student.
    """
    from qat.model.load import vocabulary_size
    from qat.pipelines.open_checkpoint import latent_or_base_weights, load_model, open_checkpoint
    from qat.pipelines.quantize_config import require_other
    from qat.pipelines.recipe import finished, recipe
    from qat.quant.scheme import Scheme
    from qat.runtime.device import Device

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
    fingerprint = cache and cache.fingerprint
    made_by = recipe(command, config, student=header.sha256, cache=fingerprint)
    done = finished(config.output, made_by)
    if done is not None:
        return already_made(config.output, done)
    student, _header = load_model(opened.path, model_id=config.model_id)
    before = measure(student, cache, device, dtype)
    changed = change(student)
    weight_of = latent_or_base_weights(opened)

    def write(model: Any, header: Any, output: Path) -> None:
        header.metrics.update(changed | cost(before, header.metrics))  # the closing line's as well
        write_student(
            model,
            header,
            output,
            text_source=text_folder,
            weight_of=weight_of,
            is_float16=is_float16,
        )

    scheme = new_scheme(Scheme.from_dict(header.scheme)).to_dict()
    return measure_and_write(
        student,
        replace(header, scheme=scheme, made_by=made_by),
        config.output,
        cache=cache,
        write=write,
        started=started,
        device=device,
        dtype=dtype,
    )


def cost(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Return what a change did to the distance from the teacher, where it was measured."""
    if not before:
        return {}
    former = before["kl_nats"]
    return {"kl_nats_before": former, "kl_nats_cost": after["kl_nats"] - former}


def measure(model: Any, cache: Any, device: Any, dtype: Any) -> dict[str, Any]:
    """Return a student's numbers on a cache, none without one; the student ends on the CPU."""
    from qat.evaluate.on_cache import evaluate_on_cache
    from qat.model.checkpoint import dense_parts_in
    from qat.model.surgery import release_weights

    if cache is None:
        return {}
    with dense_parts_in(model, dtype), device.hosting(model):
        values = evaluate_on_cache(model, cache, device=device.torch_device, dtype=dtype)
        release_weights(model)
    return values


def write_student(
    model: Any,
    header: Any,
    output: Path,
    *,
    text_source: Path,
    weight_of: Any = None,
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
    from qat.legacy.student import write_seed_checkpoint
    from qat.model.checkpoint import write_checkpoint
    from qat.pipelines.quantize_config import SEED_SUFFIX
    from qat.storage.files import write_json
    from qat.tracking.record import SUMMARY

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


def already_made(output: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the closing values of a student that this recipe has made before."""
    say(f"{output} is made by this very recipe: nothing to do")
    return {"checkpoint": str(output), **metrics}
