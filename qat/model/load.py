"""Models from folders and hub names: tokenizer, dense model, student, and who they are."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qat.model.attention import widen_attention
from qat.model.checkpoint import is_checkpoint, read_model_config, require_finite
from qat.storage.decode import FileName, naming, read_as, reading
from qat.storage.files import fingerprint, recover_interrupted_replace, sha256_of_file
from qat.storage.hub import HubName, parse_hub_name

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
HUB_SKIPPED = ["*/*", "consolidated*"]  # other formats of the same weights
WHAT_TO_GIVE = (
    "give a folder of a model or a student, or a hub model as hf:OWNER/NAME (`qat fetch smollm2` "
    "makes a folder)"
)
# Of tokens: tokenizers lists every number below the largest as it is saved, 4 bytes each.
MOST_IDS = 1 << 24
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust's libraries tell them


def model_folder(name: str | Path) -> Path:
    """Return where a model's files are: the folder itself, or the hub's snapshot of that name.

    Everything else reads folders, so a hub name and a copy of its files mean the same.

    Raises:
        FileNotFoundError: If there is neither, at once: what is no hub name is not sought.
    """
    recover_interrupted_replace(Path(name))
    if Path(name).exists():
        return Path(name)
    asked = parse_hub_name(str(name))
    if asked is None:
        raise FileNotFoundError(f"no folder {name}, and it is no hub name; {WHAT_TO_GIVE}")
    return hub_snapshot(asked)


@cache
def hub_snapshot(asked: HubName) -> Path:
    """Return the folder of a hub model's files, fetched where this machine has them not yet.

    HF_HUB_OFFLINE and HF_HOME are heeded.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(
        snapshot_download, asked.repository, revision=asked.revision, ignore_patterns=HUB_SKIPPED
    )
    try:
        folder = Path(fetch(allow_patterns=HUB_FILES))
        has_weights = any(folder.glob("*.safetensors"))
        return folder if has_weights else Path(fetch(allow_patterns=[*HUB_FILES, "*.bin"]))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise FileNotFoundError(
            f"no folder {asked.repository}, and the model hub does not give it ({why}); "
            f"{WHAT_TO_GIVE}"
        ) from error


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a Hugging Face folder or hub name."""
    from transformers import AutoTokenizer

    folder = model_folder(name)
    with reading(f"tokenizer of {folder}", "fetch or make that folder again"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no tokenizer in {folder}; {WHAT_TO_GIVE}") from error
        tokenizer("")  # some of its settings are read when it is used
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= MOST_IDS:
        raise ValueError(
            f"tokenizer of {folder} has the token id {largest:,}, {MOST_IDS:,} or more; fetch or "
            "make that folder again"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files.

    Raises:
        OSError: Also where its library raises the system's errors in a form of its own.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception and (found := SYSTEM_ERROR.search(str(error))):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def vocabulary_size(name: str | Path) -> int:
    """Return the width of a model's logits, read from its config alone."""
    return read_model_config(model_folder(name)).get_text_config().vocab_size


def load_dense(name: str | Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a Hugging Face causal LM on the CPU, in eval mode, frozen.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If a weight is missing, damaged or of another shape than the config's.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = dense_folder(name)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is an error below
    read_model_config(folder)
    require_own_files(folder)
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if not weight_files(folder):
        raise FileNotFoundError(f"no weights in {folder}; {WHAT_TO_GIVE}")
    try:
        with reading(folder, "fetch or make that folder again"):
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, trust_remote_code=False, **options
            )
    finally:
        logging.set_verbosity(verbosity)
    wrong = sorted(report["missing_keys"]) + [key for key, *_ in report["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} weights do not fit config.json, {wrong[0]} the first; "
            "fetch the model again"
        )
    with naming(folder):
        for key, tensor in model.named_parameters():
            require_finite(tensor, key)
    widen_attention(model)
    return model.eval().requires_grad_(False)


def dense_folder(name: str | Path) -> Path:
    """Return the folder of a full-precision model; refuse one of a student, or of no model."""
    folder = model_folder(name)
    if is_checkpoint(folder):
        raise ValueError(f"{name} is a student; give the full-precision model it was made from")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json; {WHAT_TO_GIVE}")
    return folder


def require_own_files(folder: Path) -> None:
    """Refuse a model folder whose files name others: shards elsewhere, or a model to adapt."""
    for index in folder.glob("*.index.json"):
        read_as(index, ShardIndex)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter; merge it into its model, and give that folder")


class ShardIndex(TypedDict):
    """What is read of an index of weight files."""

    weight_map: dict[str, FileName]


def model_identity(name: str | Path) -> dict[str, str]:
    """Return what names a model's weights for good: its name and a hash of its weight files."""
    folder = model_folder(name)
    files = weight_files(folder)
    if not files:
        raise FileNotFoundError(f"no weights in {folder}; {WHAT_TO_GIVE}")
    sums = {file.name: unchanged_sha256(file) for file in files}
    identity = {"name": folder.resolve().name, "weights": fingerprint(sums)}
    if not Path(name).exists():  # a snapshot's folder is named after its commit
        identity |= {"name": parse_hub_name(str(name)).repository, "revision": folder.name}
    return identity


def unchanged_sha256(path: Path) -> str:
    """Return a file's sha256, read once in a process while size and time stay the same."""
    status = path.stat()
    return sha256_at(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def sha256_at(path: Path, _num_bytes: int, _mtime_ns: int) -> str:
    """Return the sha256 of a file of a size and time."""
    return sha256_of_file(path)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a model's weights load from, in order."""
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """Full-precision weights by layer name: `weights(layer)` is one, None where it is unknown."""

    read: Callable[[str], Tensor | None]
    why_missing: str | None = None
    """Why there are none at all."""

    def __call__(self, layer: str) -> Tensor | None:
        """Return the weight of a layer, (O, I)."""
        return self.read(layer)


def base_weights(name: str | Path | None, identity: dict[str, str | None]) -> BaseWeights:
    """Return the weights of a base model, if they are those that a student was made from.

    They are read one at a time from the folder's memory-mapped files. A model that is not there
    gives no weights.
    """
    if name is None:
        return BaseWeights(lambda _layer: None, "its checkpoint names no full-precision model")
    try:
        folder = model_folder(name)
        found = model_identity(folder)["weights"]
    except FileNotFoundError as error:
        return BaseWeights(lambda _layer: None, str(error).partition(";")[0])
    if found != identity.get("weights"):
        return BaseWeights(
            lambda _layer: None, f"{name} holds other weights than the student was made from"
        )
    where: dict[str, Callable[[], Tensor]] = {}
    for file in weight_files(folder):
        where |= tensors_in(file)

    return BaseWeights(lambda layer: where.get(f"{layer}.weight", lambda: None)())


def tensors_in(file: Path) -> dict[str, Callable[[], Tensor]]:
    """Return a function for each tensor of a weight file, by name, that reads it."""
    if file.suffix == ".safetensors":

        def read(key: str) -> Tensor:
            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(key)

        with reading(file), safe_open(file, framework="pt") as handle:
            return {key: partial(read, key) for key in handle.keys()}  # noqa: SIM118 not a dict
    if not file.name.startswith("pytorch_model"):  # such as training_args.bin
        return {}
    load = partial(torch.load, file, map_location="cpu", weights_only=True)
    with reading(file):
        try:
            tensors = load(mmap=True)
        except RuntimeError:  # of before torch 1.6, which cannot be mapped
            tensors = load()
    return {key: partial(tensors.get, key) for key in tensors}
