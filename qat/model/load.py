"""Models from folders and hub names: tokenizer, dense model, student, and who they are."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qat.archive import SUFFIXES, archive_stem, extract_archive
from qat.files import fingerprint, settle_folder, sha256_of_file
from qat.model.attention import widen_attention
from qat.model.checkpoint import CheckpointHeader, is_checkpoint, read_checkpoint, read_header
from qat.model.seed_format import (
    SeedCheckpoint,
    find_seed_file,
    open_seed_checkpoint,
    seed_identity,
    seed_notes,
)
from qat.model.seed_student import latent_weights, read_seed_student, seed_scheme

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
HUB_SKIPPED = ("*/*", "consolidated*")  # other formats of the same weights
BEST_NAME = "best"
FINAL_NAME = "final"
WHAT_TO_GIVE = (
    "give a folder of a model or a student, or a hub name (`qat fetch smollm2` makes a folder)"
)


def model_folder(name: str | Path) -> Path:
    """Return where a model's files are: the folder itself, or the hub's snapshot of that name.

    Everything else reads folders, so a hub name and a copy of its files mean the same.

    Raises:
        FileNotFoundError: If there is neither, at once: a word that is no hub name is not sought.
    """
    settle_folder(Path(name))
    if Path(name).exists():
        return Path(name)
    if not HUB_NAME.fullmatch(str(name)):
        raise FileNotFoundError(f"no folder {name}, and no hub has such names; {WHAT_TO_GIVE}")
    return hub_snapshot(str(name))


@cache
def hub_snapshot(name: str) -> Path:
    """Return the folder of a hub model's files, fetched where this machine has them not yet.

    HF_HUB_OFFLINE and HF_HOME are heeded.
    """
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                name, allow_patterns=list(patterns), ignore_patterns=list(HUB_SKIPPED)
            )
        )

    try:
        folder = fetch(*HUB_FILES)
        return folder if any(folder.glob("*.safetensors")) else fetch(*HUB_FILES, "*.bin")
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise FileNotFoundError(
            f"no folder {name}, and the model hub does not give it ({why}); {WHAT_TO_GIVE}"
        ) from error


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer of a Hugging Face folder or hub name.

    Raises:
        FileNotFoundError: If there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    folder = model_folder(name)
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no tokenizer in {folder}; {WHAT_TO_GIVE}") from error


def vocabulary_size(name: str | Path) -> int:
    """Return the width of a model's logits, read from its config alone.

    Raises:
        ValueError: If the config is missing, damaged or of an unknown kind of model.
    """
    from transformers import AutoConfig

    folder = model_folder(name)
    try:
        return AutoConfig.from_pretrained(str(folder)).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(f"{folder}/config.json cannot be read ({why}); {WHAT_TO_GIVE}") from error


def load_dense(name: str | Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a Hugging Face causal LM on the CPU, in eval mode, frozen.

    Args:
        name: Folder or hub name.
        dtype: Of every parameter.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If a weight is missing, damaged or of another shape than the config's.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = model_folder(name)
    if is_checkpoint(folder):
        raise ValueError(f"{name} is a student; give the full-precision model it was made from")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json; {WHAT_TO_GIVE}")
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is an error below
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except OSError as error:
        raise FileNotFoundError(f"no weights in {folder}; {WHAT_TO_GIVE}") from error
    except SafetensorError as error:
        raise ValueError(f"{folder} holds a damaged file ({error}); fetch it again") from error
    finally:
        logging.set_verbosity(verbosity)
    wrong = sorted(report["missing_keys"]) + [key for key, *_ in report["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} weights do not fit config.json, {wrong[0]} the first; "
            "fetch the model again"
        )
    widen_attention(model)
    return model.eval().requires_grad_(False)


def model_identity(name: str | Path) -> dict[str, str]:
    """Return what names a model's weights for good: its name and a hash of its weight files."""
    folder = model_folder(name)
    files = weight_files(folder)
    if not files:
        raise FileNotFoundError(f"no weights in {folder}; {WHAT_TO_GIVE}")
    sums = {file.name: sha256_of_file(file) for file in files}
    called = folder.resolve().name if Path(name).exists() else str(name)
    return {"name": called, "weights": fingerprint(sums)}


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a model's weights load from, in order."""
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a checkpoint word stands for; nothing of it is loaded yet."""

    path: Path
    """Native folder, model folder, or `.pt` file of the seeds."""
    text_folder: Path
    """Where its tokenizer, chat template and model config are."""
    header: CheckpointHeader | None
    """None where it is a full-precision model."""


def open_checkpoint(checkpoint: str | Path, *, model_id: str | None = None) -> Checkpoint:
    """Look a checkpoint word up.

    Args:
        checkpoint: Native folder, run folder (its best), `.pt` file of the seeds, a folder or
            archive with one, Hugging Face folder or hub name.
        model_id: Full-precision model of a `.pt` file; the one that its config names if not given.

    Raises:
        FileNotFoundError: If nothing of these is there.
        ValueError: If it is damaged or of another form.
    """
    path = checkpoint_path(checkpoint)
    if path.is_file():
        return open_seed_word(open_seed_checkpoint(path), model_id)
    header = read_header(path) if is_checkpoint(path) else None
    return Checkpoint(path=path, text_folder=path, header=header)


def open_seed_word(stored: SeedCheckpoint, model_id: str | None) -> Checkpoint:
    """Return what a checkpoint of the seeds stands for, its base model looked up."""
    name, folder = find_base(stored, model_id)
    notes = seed_notes(stored)
    unknown = {"name": folder.name, "weights": None}  # a config alone is enough to load
    identity = model_identity(folder) if weight_files(folder) else unknown
    header = CheckpointHeader(
        scheme=seed_scheme(stored).to_dict(),
        base_model={"path": name, **identity},
        cache_fingerprint=notes.get("cache_fingerprint"),
        made_by=notes.get("made_by", {}),
        metrics=notes.get("metrics", {}),
        sha256=seed_identity(stored),
    )
    return Checkpoint(path=stored.file, text_folder=folder, header=header)


def find_base(stored: SeedCheckpoint, model_id: str | None) -> tuple[str, Path]:
    """Return name and folder of the full-precision model of a seeds' checkpoint.

    A folder that its config names is sought from here, beside the file and beside its run.

    Raises:
        FileNotFoundError: If there is none.
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
    """Return the model that a checkpoint word names, on the CPU, in eval mode, frozen.

    Args:
        checkpoint: As in `open_checkpoint`.
        model_id: As in `open_checkpoint`.
        dtype: Of the dense parts.

    Returns:
        The model, and its header if it is a student.

    Raises:
        FileNotFoundError: If nothing of these is there.
        ValueError: If it is damaged or of another form.
    """
    opened = open_checkpoint(checkpoint, model_id=model_id)
    if opened.header is None:
        return load_dense(opened.path, dtype=dtype), None
    if opened.path.is_dir():
        return read_checkpoint(opened.path, dtype=dtype)
    stored = open_seed_checkpoint(opened.path)
    model, _scheme = read_seed_student(stored, opened.text_folder, dtype=dtype)
    return model, opened.header


def checkpoint_path(checkpoint: str | Path) -> Path:
    """Return the folder or `.pt` file of a checkpoint word: a run stands for its best student.

    Archives are unpacked beside themselves, once.

    Raises:
        FileNotFoundError: If there is neither a folder nor a hub model of that name.
        ValueError: If it is a file of another kind, or several checkpoints.
    """
    path = Path(checkpoint)
    if path.is_file() and path.name.endswith(SUFFIXES):
        folder = path.parent / archive_stem(path.name)
        path = folder if folder.is_dir() else extract_archive(path, path.parent, name=folder.name)
    for name in ("", BEST_NAME, FINAL_NAME):
        settle_folder(path / name)
        if is_checkpoint(path / name):
            return path / name
    seed_file = find_seed_file(path)
    if seed_file is not None:
        return seed_file
    if path.is_file():
        raise ValueError(f"{path} is no checkpoint; {WHAT_TO_GIVE}, a .pt file or an archive")
    return model_folder(path if path.exists() else checkpoint)


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """Return the folder that holds a checkpoint's tokenizer and config."""
    return open_checkpoint(checkpoint).text_folder


def latent_or_base_weights(
    opened: Checkpoint, base: dict[str, str] | None = None
) -> Callable[[str], torch.Tensor | None]:
    """Return a function from a layer's name to the weight that its indices were made from.

    A `.pt` file's latent weight where it has one, else the base model's; None where unknown.

    Args:
        opened: A student.
        base: Path and identity of its full-precision model; as in its header when not given.
    """
    base = base or opened.header.base_model
    of_base = base_weights(base["path"], base)
    if opened.path.is_dir():
        return of_base
    latent = latent_weights(open_seed_checkpoint(opened.path))

    def weight_of(layer: str) -> torch.Tensor | None:
        weight = latent(layer)
        return of_base(layer) if weight is None else weight

    return weight_of


def base_weights(
    name: str | Path, identity: dict[str, str]
) -> Callable[[str], torch.Tensor | None]:
    """Return a function from a layer's name to its full-precision weight, None where unknown.

    Weights are read one at a time from the folder's memory-mapped files, and only if they are
    those that the student was made from.

    Args:
        name: Folder or hub name of the base model; one that is not there gives no weights.
        identity: As in a checkpoint header.
    """
    try:
        folder = model_folder(name)
        is_base = model_identity(folder)["weights"] == identity.get("weights")
    except FileNotFoundError:
        is_base = False
    if not is_base:
        return lambda _layer: None
    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            where.update(dict.fromkeys(handle.keys(), file))

    def weight_of(layer: str) -> torch.Tensor | None:
        key = f"{layer}.weight"
        if key not in where:
            return None
        with safe_open(where[key], framework="pt") as handle:
            return handle.get_tensor(key)

    return weight_of
