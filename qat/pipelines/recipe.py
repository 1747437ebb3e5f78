"""What decides a student, so that one that is made already is found instead of made again."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qat.legacy.checkpoint import open_seed_checkpoint, seed_notes
from qat.model.checkpoint import is_checkpoint, read_header
from qat.pipelines.quantize_config import SEED_SUFFIX
from qat.storage.files import fingerprint


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
    """Return the metrics of a student that the same recipe has made already, None for none.

    Raises:
        FileExistsError: If something else lies at the output, also a student of another recipe.
    """
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
    raise FileExistsError(
        f"--output {output} holds a student that was made otherwise "
        f"({difference(previous, made_by)}); choose another --output, or remove it"
    )


def difference(previous: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Return the first setting or source in which two recipes differ, with both values."""
    flat = [
        {"command": each.get("command"), **each.get("settings", {}), **each.get("read", {})}
        for each in (previous, made_by)
    ]
    name = next((k for k in sorted(flat[0] | flat[1]) if flat[0].get(k) != flat[1].get(k)), None)
    if name is None:
        return "settings not recorded there"
    return f"{name} {flat[0].get(name)} there, {flat[1].get(name)} here"
