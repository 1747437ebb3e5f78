"""The last stretch of every command that makes a student: measure, write, report."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from qat.commands.door import say


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
    from qat.cache.read import TeacherCache
    from qat.model.load import load_tokenizer

    if folder is None:
        return None
    cache = TeacherCache.open(folder)
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
    from qat.calibration import collect_second_moments
    from qat.convert.recipe import calibration_batches

    if cache is None:
        say("no --cache-dir: every weight counts alike, which costs most of a 2-bit student")
        return None
    model.to(device.torch_device)
    batches = (batch.to(device.torch_device) for batch in calibration_batches(cache, count))
    moments = collect_second_moments(model, linears, batches)
    model.to("cpu")
    return {name: moment.cpu() for name, moment in moments.items()}


def calibration_tokens(cache: Any, count: int, device: Any) -> list[Any]:
    """Return the token ids that calibrate, in batches on the device."""
    from qat.convert.recipe import calibration_batches

    return [batch.to(device.torch_device) for batch in calibration_batches(cache, count)]


def measure_and_write(
    model: Any,
    header: Any,
    output: Path,
    *,
    cache: Any,
    text_source: Path,
    started: float,
    device: Any,
    dtype: Any,
) -> dict[str, Any]:
    """Measure a student on a cache if there is one, write it, return the closing values."""
    from qat.device import peak_rss_bytes
    from qat.evaluate.on_cache import evaluate_on_cache
    from qat.files import write_json
    from qat.model.checkpoint import bits_per_weight, write_checkpoint
    from qat.tracking.record import SUMMARY

    seconds = time.perf_counter() - started
    values = bits_per_weight(model)
    if cache is not None:
        model.to(device.torch_device)
        values |= evaluate_on_cache(model, cache, device=device.torch_device, dtype=dtype)
        model.to("cpu")
    values |= {"seconds": round(seconds, 2), "peak_rss_bytes": peak_rss_bytes()}
    write_checkpoint(model, replace(header, metrics=values), output, text_source=text_source)
    write_json(output / SUMMARY, values)  # so that `qat compare` shows it among the runs
    return {"checkpoint": str(output), **values}


def already_made(output: Path, header: Any) -> dict[str, Any]:
    """Return the closing values of a student that this recipe has made before."""
    say(f"{output} is made by this very recipe: nothing to do")
    return {"checkpoint": str(output), **header.metrics}
