"""Models from folders and hub names: tokenizer, dense model, student, and who they are."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qat.model.attention import widen_attention
from qat.model.checkpoint import is_checkpoint
from qat.storage.files import fingerprint, settle_folder, sha256_of_file

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
HUB_SKIPPED = ("*/*", "consolidated*")  # other formats of the same weights
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
