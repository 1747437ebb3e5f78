"""What decides a student, so that one that is made already is found instead of made again."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.cache.read import TeacherCache
from qat.legacy.checkpoint import open_seed_checkpoint, seed_notes
from qat.model.checkpoint import is_checkpoint, read_header
from qat.pipelines.quantize_config import SEED_SUFFIX
from qat.storage.files import fingerprint

CALIBRATION_BATCH = 16


def recipe(command: str, config: Any, **identity: Any) -> dict[str, Any]:
    """Return what decides a student to the bit: settings and the identity of what was read.

    Paths and devices do not decide; contents do.

    Args:
        command: As typed.
        config: The command's config.
        identity: Hashes of base model, cache and checkpoint.
    """
    skipped = {"output", "device", "model", "model_id", "cache_dir", "q4_rank"}
    skipped |= {name for name in asdict(config) if name.endswith("checkpoint")}
    settings = {k: v for k, v in asdict(config).items() if k not in skipped}
    return {"command": command, "settings": settings, "read": identity}


def finished(output: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """Return the closing values of a student that this very recipe has made already.

    Raises:
        FileExistsError: If something else than a student is at the output.
    """
    if is_checkpoint(output):
        header = read_header(output)
        former, metrics = header.made_by, header.metrics
    elif output.is_file() and output.suffix == SEED_SUFFIX:
        try:
            notes = seed_notes(open_seed_checkpoint(output))
        except ValueError as error:
            raise FileExistsError(f"--output {output} is there: {error}") from error
        former, metrics = notes.get("made_by", {}), notes.get("metrics", {})
    elif output.exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} exists and is no student; choose another name")
    else:
        return None
    return metrics if fingerprint(former) == fingerprint(made_by) else None


def calibration_batches(cache: TeacherCache, count: int) -> Iterator[Tensor]:
    """Yield token ids (B, L) of the first `count` training sequences."""
    chosen = cache.sequence_ids("train")[:count]
    for start in range(0, len(chosen), CALIBRATION_BATCH):
        yield cache.batch(chosen[start : start + CALIBRATION_BATCH]).input_ids
