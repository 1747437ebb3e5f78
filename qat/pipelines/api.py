"""The Python API: each function takes what matters as parameters, the rest as settings by name.

Settings are the fields of the command's config class, described there; a group of fields may be
given as a dict. An unknown one is a TypeError, one out of range a ValueError, what is not there a
FileNotFoundError. Progress is logged to the logger `qat`. A function imports its pipeline when it
is called, so that an export loads no trainer.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qat.cache.config import BuildCacheConfig
from qat.evaluate.config import EvaluateConfig
from qat.export.config import ExportConfig, Target
from qat.pipelines.compress_config import CompressConfig
from qat.pipelines.quantize_config import InitStudentConfig
from qat.storage.addresses import require_paths
from qat.train.config import TrainConfig

if TYPE_CHECKING:
    from qat.pipelines.build_cache import BuildCacheResult
    from qat.pipelines.compress import CompressResult
    from qat.pipelines.evaluate import EvaluateResult
    from qat.pipelines.export import ExportResult
    from qat.pipelines.students import StudentResult
    from qat.pipelines.train import TrainResult

Config = TypeVar("Config")
PathLike = str | Path


def build_cache(teacher: PathLike, data: PathLike, **settings: object) -> "BuildCacheResult":
    """Write a teacher's logits on a data set to a cache; a finished one is found again.

    Args:
        teacher: Hugging Face folder or hub name.
        data: A json, jsonl, parquet or text file, a folder of them, or a hub name.
        settings: Fields of `BuildCacheConfig`, such as seq_len, top_k, format, output_dir.

    Returns:
        The cache's folder and fingerprint, tokens and rates.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> made = qat.build_cache("Qwen/Qwen3-0.6B", "records.jsonl", seq_len=64)
        >>> made.cache
    """
    from qat.pipelines.build_cache import build_cache as run

    return run(make_config(BuildCacheConfig, teacher=str(teacher), data=str(data), **settings))


def quantize(
    model: PathLike,
    plan: str,
    *,
    cache: PathLike | None = None,
    output: PathLike,
    **settings: object,
) -> "StudentResult":
    """Quantize a full-precision model to a student, fitted to its weights and activations.

    Args:
        model: Hugging Face folder or hub name.
        plan: Format of every tensor, such as "q4a4", "deploy" or "q2a4, embed=int4-g32".
        cache: Teacher cache that calibrates the fit and measures the student.
        output: Folder of the student; one that was made with the same settings is found again.
        settings: Fields of `InitStudentConfig`, such as fit, calibration_sequences, device.

    Returns:
        The student's folder, and what was measured.

    Raises:
        ValueError: If the plan does not fit the model, or the cache is of another one.

    Example:
        >>> qat.quantize("Qwen/Qwen3-0.6B", "deploy", cache=made.cache, output="runs/q2_init")
    """
    from qat.pipelines.quantize import quantize as run

    named = {"model": str(model), "plan": plan, "cache_dir": cache, "output": output}
    return run(make_config(InitStudentConfig, **named, **settings))


def compress(
    model: PathLike, data: PathLike, output: PathLike, **settings: object
) -> "CompressResult":
    """Make the best file of a size: formats chosen, fitted, trained, exported and measured.

    Args:
        model: Hugging Face folder or hub name of the full-precision model.
        data: Text that calibrates, trains and validates; as `build_cache` takes it.
        output: The file (gguf) or folder; must not exist. Stages are kept next to it.
        settings: Fields of `CompressConfig`: one of size, bits_per_weight and kl; to, minutes,
            eval_text and others.

    Returns:
        The file's bytes, its KL to the teacher as it was read back, and the plan.

    Raises:
        TypeError: If a setting is unknown; names it.
        ValueError: If the size is below the smallest plan's, or the target cannot hold the model.
        FileNotFoundError: If model or data are not there.

    Example:
        >>> qat.compress("Qwen/Qwen3-0.6B", "chat.jsonl", "q.gguf", size="300MB").kl_nats
    """
    from qat.pipelines.compress import compress as run

    return run(
        make_config(CompressConfig, model=str(model), data=str(data), output=output, **settings)
    )


def train(
    checkpoint: PathLike, cache: PathLike, *, output_dir: PathLike, **settings: object
) -> "TrainResult":
    """Distil the teacher's cache into a student; an interrupted run continues where it stopped.

    Args:
        checkpoint: The student: native folder, run folder or `.pt` file.
        cache: Teacher cache to learn from; its held-out split measures.
        output_dir: Folder of the run.
        settings: Fields of `TrainConfig`, such as max_steps, batch_size, device.

    Returns:
        The best student's folder, and the numbers of the run.

    Raises:
        ValueError: If settings contradict each other, or the cache is of another teacher.
        FloatingPointError: If the loss stops being finite.

    Example:
        >>> run = qat.train("runs/q2_init", made.cache, output_dir="runs/q2", max_steps=400)
        >>> run.checkpoint
    """
    from qat.pipelines.train import train as run

    named = {"checkpoint": checkpoint, "cache_dir": cache, "output_dir": output_dir}
    return run(make_config(TrainConfig, **named, **settings))


def evaluate(
    checkpoint: PathLike,
    *,
    cache: PathLike | None = None,
    text: PathLike | None = None,
    teacher: PathLike | None = None,
    **settings: object,
) -> "EvaluateResult":
    """Measure a student or a model on a cache's held-out split, or on a text.

    Args:
        checkpoint: Native folder, run folder (its best), `.pt` file, or a model folder.
        cache: Teacher cache to measure on; either this or a text.
        text: Plain text file to measure on.
        teacher: Full-precision model to compare with.
        settings: Fields of `EvaluateConfig`, such as num_sequences, batch_size, device.

    Returns:
        KL to the teacher, perplexity, agreement and bits per weight; None where unknown.

    Raises:
        ValueError: If neither or both of cache and text are given, or they do not fit the student.

    Example:
        >>> qat.evaluate("runs/q2", cache=made.cache).kl_nats
    """
    from qat.pipelines.evaluate import evaluate as run

    named = {"checkpoint": str(checkpoint), "teacher": teacher and str(teacher)}
    return run(make_config(EvaluateConfig, **named, cache_dir=cache, text=text, **settings))


def export(
    checkpoint: PathLike, to: Target, output: PathLike, **settings: object
) -> "ExportResult":
    """Write a student in another program's format, and compare what was written with it.

    Args:
        checkpoint: The student: native folder, run folder (its best) or `.pt` file.
        to: "hf", "hf-quantized", "gguf", "mlx", "compressed-tensors" or "coreml".
        output: Where it goes; must not exist.
        settings: Fields of `ExportConfig`, such as dtype, head, model_id.

    Returns:
        The path, and what was compared.

    Raises:
        ValueError: If the output exists, or the format cannot hold the student exactly.

    Example:
        >>> qat.export("runs/q2", "gguf", "exports/q2.gguf").exact
    """
    from qat.pipelines.export import export as run

    named = {"checkpoint": str(checkpoint), "to": to, "output": output}
    return run(make_config(ExportConfig, **named, **settings))


def make_config(config_type: type[Config], **settings: object) -> Config:
    """Return a config of these settings; strings become paths and dicts become groups of fields."""
    types = {field.name: field.type for field in fields(config_type)}
    unknown = sorted(settings.keys() - types.keys())
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no setting of {config_type.__name__}")
    for name, value in settings.items():
        if types[name] in (Path, Path | None) and isinstance(value, str):
            settings[name] = Path(value)
        elif is_dataclass(types[name]) and isinstance(value, Mapping):
            settings[name] = make_config(types[name], **value)
    config = config_type(**settings)
    require_paths(config)
    return config
