"""Models from folders and hub names: tokenizer, dense model, student, and who they are."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qat.files import fingerprint, sha256_of_file
from qat.model.checkpoint import CheckpointHeader, is_checkpoint, read_checkpoint

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
BEST_NAME = "best"
FINAL_NAME = "final"


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer of a Hugging Face folder or hub name.

    Raises:
        FileNotFoundError: If there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no tokenizer at {name}; {what_to_give(name)}") from error


def load_dense(name: str | Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a Hugging Face causal LM on the CPU, in eval mode, frozen.

    Args:
        name: Folder or hub name.
        dtype: Of every parameter.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json; {what_to_give(name)}")
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype)
    except OSError as error:
        raise FileNotFoundError(f"no model at {name}; {what_to_give(name)}") from error
    return model.eval().requires_grad_(False)


def what_to_give(name: str | Path) -> str:
    """Return the remedy for a model that is not there."""
    return "give a Hugging Face folder or hub name (`qat fetch smollm2` makes one)"


def model_identity(name: str | Path, model: nn.Module | None = None) -> dict[str, str]:
    """Return what names a model's weights for good: its name and a hash of its weights.

    Args:
        name: Folder or hub name; a folder's weight files are hashed, for a hub name the tensors.
        model: The model loaded from it; not needed for a folder.
    """
    folder = Path(name)
    if folder.is_dir():
        files = sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))
        sums = {file.name: sha256_of_file(file) for file in files}
        return {"name": folder.resolve().name, "weights": fingerprint(sums)}
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {"name": str(name), "weights": digest.hexdigest()[:16]}


def load_model(
    checkpoint: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, CheckpointHeader | None]:
    """Return the model that a checkpoint word names, on the CPU, in eval mode, frozen.

    Args:
        checkpoint: Native folder, run folder (its best), Hugging Face folder or hub name.
        dtype: Of the dense parts.

    Returns:
        The model, and its header if it is a student.

    Raises:
        FileNotFoundError: If nothing of these is there.
    """
    folder = checkpoint_folder(checkpoint)
    if is_checkpoint(folder):
        return read_checkpoint(folder, dtype=dtype)
    return load_dense(folder if Path(checkpoint).exists() else checkpoint, dtype=dtype), None


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """Return the folder that holds a checkpoint's files: a run stands for its best student."""
    folder = Path(checkpoint)
    for name in ("", BEST_NAME, FINAL_NAME):
        if is_checkpoint(folder / name):
            return folder / name
    return folder


def base_weights(
    name: str | Path, identity: dict[str, str]
) -> Callable[[str], torch.Tensor | None]:
    """Return a function from a layer's name to its full-precision weight, None where unknown.

    Weights are read one at a time from the folder's memory-mapped files, and only if they are
    those that the student was made from.

    Args:
        name: Folder of the base model; anything else gives no weights.
        identity: As in a checkpoint header.
    """
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    if not files or model_identity(name)["weights"] != identity.get("weights"):
        return lambda _layer: None
    where = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            where.update(dict.fromkeys(handle.keys(), file))

    def weight_of(layer: str) -> torch.Tensor | None:
        key = f"{layer}.weight"
        if key not in where:
            return None
        with safe_open(where[key], framework="pt") as handle:
            return handle.get_tensor(key)

    return weight_of
