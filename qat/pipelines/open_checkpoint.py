"""What a checkpoint name stands for: a native folder, a run, a file of the seeds, a model folder.

The one place that tells native students and the seeds' forms apart.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qat.export.from_gguf import read_gguf_model
from qat.export.to_gguf import SUFFIX as GGUF_SUFFIX
from qat.legacy.checkpoint import (
    SeedCheckpoint,
    find_seed_file,
    open_seed_checkpoint,
    seed_identity,
    seed_notes,
)
from qat.legacy.student import latent_weights, read_seed_student, seed_rules
from qat.model.checkpoint import (
    CheckpointHeader,
    empty_model,
    is_checkpoint,
    read_checkpoint,
    read_header,
)
from qat.model.load import (
    WHAT_TO_GIVE,
    BaseWeights,
    base_weights,
    load_dense,
    model_folder,
    model_identity,
    weight_files,
)
from qat.model.surgery import model_tensors
from qat.storage.archive import SUFFIXES, extract_once
from qat.storage.files import recover_interrupted_replace

BEST_NAME = "best"
FINAL_NAME = "final"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a checkpoint name stands for; nothing of it is loaded yet."""

    path: Path
    """Native folder, model folder, `.pt` file of the seeds, or any program's `.gguf` file."""
    text_folder: Path
    """Where its tokenizer, chat template and model config are."""
    header: CheckpointHeader | None
    """None where it is a full-precision model."""

    def load(self, *, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model on the CPU, in eval mode, frozen; its dense parts are of the dtype."""
        if self.path.suffix == GGUF_SUFFIX:
            return read_gguf_model(self.path, self.text_folder, dtype=dtype)
        if self.header is None:
            return load_dense(self.path, dtype=dtype)
        if self.path.is_dir():
            return read_checkpoint(self.path, dtype=dtype)[0]
        return read_seed_student(open_seed_checkpoint(self.path), self.text_folder, dtype=dtype)

    def require_student(self, flag: str, remedy: str) -> CheckpointHeader:
        """Return the header of a student."""
        if self.header is None:
            raise ValueError(f"{flag} is a full-precision model; {remedy}")
        return self.header


def open_checkpoint(checkpoint: str | Path, *, model_id: str | None = None) -> Checkpoint:
    """Look a checkpoint up.

    Args:
        checkpoint: Native folder, run folder (its best), `.pt` file of the seeds, a folder or
            archive with one, Hugging Face folder or hub name, `.gguf` file of any program.
        model_id: Full-precision model of a `.pt` file, the one that its config names if not given;
            of a `.gguf` file, whose tokenizer and config are read from it.

    Raises:
        FileNotFoundError: If nothing of these is there.
        ValueError: If it is damaged or of another form.
    """
    path = Path(checkpoint)
    if path.suffix == GGUF_SUFFIX and path.is_file():
        if model_id is None:
            raise ValueError(f"{path} needs its full-precision model; give it with --model-id")
        return Checkpoint(path=path, text_folder=model_folder(model_id), header=None)
    path = checkpoint_path(checkpoint)
    if path.is_file():
        return open_seed_file(open_seed_checkpoint(path), model_id)
    header = read_header(path) if is_checkpoint(path) else None
    return Checkpoint(path=path, text_folder=path, header=header)


def open_seed_file(stored: SeedCheckpoint, model_id: str | None) -> Checkpoint:
    """Look up the base model of a checkpoint of the seeds."""
    name, folder = find_base(stored, model_id)
    notes = seed_notes(stored)
    unknown = {"name": folder.name, "weights": None}  # a config alone is enough to load
    identity = model_identity(folder) if weight_files(folder) else unknown
    header = CheckpointHeader(
        plan=seed_rules(stored)
        .resolve(model_tensors(empty_model(folder, device="meta")))
        .to_dict(),
        base_model={"path": name, **identity},
        cache_fingerprint=notes.get("cache_fingerprint"),
        made_by=notes.get("made_by", {}),
        metrics=notes.get("metrics", {}),
        sha256=seed_identity(stored),
    )
    return Checkpoint(path=stored.file, text_folder=folder, header=header)


def find_base(stored: SeedCheckpoint, model_id: str | None) -> tuple[str, Path]:
    """Return name and folder of the full-precision model of a seeds' checkpoint.

    A folder that its config names is looked for from here, next to the file and next to its run.
    """
    named = model_id or stored.config.get("model_id")
    if not named:
        raise FileNotFoundError(
            f"{stored.file} names no full-precision model; give it with --model-id"
        )
    if model_id is None:
        for start in (Path(), stored.file.parent, stored.file.parent.parent):
            if (start / named / "config.json").is_file():
                return str(start / named), start / named
    try:
        return named, model_folder(named)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{stored.file} is of the model {named}, which is not here ({error}); "
            "give its folder with --model-id"
        ) from error


def load_model(
    checkpoint: str | Path, *, model_id: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, CheckpointHeader | None]:
    """Return the model that a checkpoint names, and its header if it is a student."""
    opened = open_checkpoint(checkpoint, model_id=model_id)
    return opened.load(dtype=dtype), opened.header


def checkpoint_path(checkpoint: str | Path) -> Path:
    """Return the folder or `.pt` file of a checkpoint: a run stands for its best student.

    Archives are extracted next to themselves, again where an archive has changed.
    """
    path = Path(checkpoint)
    if path.is_file() and path.name.endswith(SUFFIXES):
        path = extract_once(path)
    for name in ("", BEST_NAME, FINAL_NAME):
        recover_interrupted_replace(path / name)
        if is_checkpoint(path / name):
            return path / name
    seed_file = find_seed_file(path)
    if seed_file is not None:
        return seed_file
    for name in (BEST_NAME, FINAL_NAME):  # of a run that trains a new model
        if (path / name / "config.json").is_file():
            return path / name
    if path.is_file():
        raise ValueError(f"{path} is no checkpoint; {WHAT_TO_GIVE}, a .pt file or an archive")
    return model_folder(path if path.exists() else checkpoint)


def latent_or_base_weights(opened: Checkpoint, base: dict[str, str] | None = None) -> BaseWeights:
    """Return the weights that a student's indices were made from, by layer name.

    A `.pt` file's latent weight where it has one, else the base model's; None where unknown.

    Args:
        opened: A student.
        base: Path and identity of its full-precision model; as in its header when not given.
    """
    base = base or opened.header.base_model
    of_base = base_weights(base["path"], base)
    if opened.path.is_dir():
        return of_base
    stored = open_seed_checkpoint(opened.path)
    latent = latent_weights(stored)

    def weight_of(layer: str) -> torch.Tensor | None:
        weight = latent(layer)
        return of_base(layer) if weight is None else weight

    has_latent = any(latent(layer) is not None for layer in stored.layers)
    return BaseWeights(weight_of, None if has_latent else of_base.why_missing)
