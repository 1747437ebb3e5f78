"""What decides a student, so that one that is made already is found instead of made again."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qat.legacy.checkpoint import open_seed_checkpoint, seed_notes
from qat.model.checkpoint import is_checkpoint, read_header
from qat.pipelines.quantize_config import SEED_SUFFIX
from qat.storage.files import fingerprint
from qat.train.run_folder import first_difference


def recipe(command: str, config: Any, **identity: Any) -> dict[str, Any]:
    """Return what decides a student to the bit: settings and the identity of what was read.

    Paths and devices do not decide; contents do.
    """
    skipped = {"output", "device", "model", "model_id", "cache_dir", "q4_rank"}
    skipped |= {name for name in asdict(config) if name.endswith("checkpoint")}
    settings = {k: v for k, v in asdict(config).items() if k not in skipped}
    return {"command": command, "settings": settings, "read": identity}


def finished(output: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """Return the metrics of a student that the same recipe has made already, None for none."""
    if is_checkpoint(output):
        header = read_header(output)
        previous, metrics = header.made_by, header.metrics
    elif output.is_file() and output.suffix == SEED_SUFFIX:
        try:
            notes = seed_notes(open_seed_checkpoint(output))
        except ValueError as error:
            raise FileExistsError(f"--output {output} is there: {error}") from error
        previous, metrics = notes.get("made_by", {}), notes.get("metrics", {})
    elif output.exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} exists and is no student; choose another name")
    else:
        return None
    if fingerprint(previous) == fingerprint(made_by):
        return metrics
    name, old, new = first_difference(previous, made_by)
    difference = f"{name} {old} there, {new} here" if name else "settings not recorded there"
    raise FileExistsError(
        f"--output {output} holds a student that was made otherwise "
        f"({difference}); choose another --output, or remove it"
    )
