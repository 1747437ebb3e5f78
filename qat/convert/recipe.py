"""What decides a student, so that one that is made already is found instead of made again."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.cache.read import TeacherCache
from qat.files import fingerprint
from qat.model.checkpoint import CheckpointHeader, is_checkpoint, read_header

CALIBRATION_BATCH = 16


def recipe(command: str, config: Any, **identity: Any) -> dict[str, Any]:
    """Return what decides a student to the bit: settings and the identity of what was read.

    Paths and devices do not decide; contents do.

    Args:
        command: As typed.
        config: The command's config.
        identity: Hashes of base model, cache and checkpoint.
    """
    skipped = {"output", "device", "model", "model_id", "cache_dir", "q4_checkpoint"}
    settings = {k: v for k, v in asdict(config).items() if k not in skipped}
    return {"command": command, "settings": settings, "read": identity}


def finished(output: Path, made_by: dict[str, Any]) -> CheckpointHeader | None:
    """Return the header of a student that this very recipe has made already.

    Raises:
        FileExistsError: If something else than a student is at the output.
    """
    if is_checkpoint(output):
        header = read_header(output)
        return header if fingerprint(header.made_by) == fingerprint(made_by) else None
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} exists and is no student; choose another folder")
    return None


def calibration_batches(cache: TeacherCache, count: int) -> Iterator[Tensor]:
    """Yield token ids (B, L) of the first `count` training sequences."""
    chosen = cache.sequence_ids("train")[:count]
    for start in range(0, len(chosen), CALIBRATION_BATCH):
        yield cache.batch(chosen[start : start + CALIBRATION_BATCH]).input_ids
