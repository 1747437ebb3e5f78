"""Text to a tokenizer, which is found again where it exists."""

from dataclasses import dataclass
from pathlib import Path

from qat.data.chat import plain_texts
from qat.data.config import TrainTokenizerConfig
from qat.data.records import read_records, source_revision
from qat.data.text import tokenizer_sha256
from qat.data.vocabulary import train_tokenizer as learn
from qat.model.load import load_tokenizer, save_tokenizer
from qat.storage.decode import object_in
from qat.storage.files import atomic_folder, folder_lock, write_json
from qat.tracking.messages import say
from qat.tracking.record import config_as_json

RECORD = "training.json"  # what the tokenizer was learned from


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTokenizerResult:
    """A tokenizer."""

    tokenizer: str
    """Its folder."""
    tokens: int
    """Of the vocabulary."""
    sha256: str
    """Of all that turns text into ids."""


def train_tokenizer(config: TrainTokenizerConfig) -> TrainTokenizerResult:
    """Learn a tokenizer and write its folder, or find it already complete.

    Raises:
        ValueError: If the folder holds something else, or the text does not fit the settings.
        FileNotFoundError: If there is no such text.
    """
    settings = {k: v for k, v in config_as_json(config).items() if k not in ("data", "output")}
    asked = {"data_revision": source_revision(config.data), **settings}
    with folder_lock(config.output):
        if is_complete(config.output, asked):
            say(f"{config.output} is already complete: nothing to do")
        else:
            made = learn(
                plain_texts(read_records(config.data), config.text_column),
                config.kind,
                vocab_size=config.vocab_size,
                special_tokens=config.special_tokens,
                num_lines=config.num_lines,
                seed=config.seed,
            )
            with atomic_folder(config.output) as folder:
                save_tokenizer(made, folder)
                write_json(folder / RECORD, asked)
    tokenizer = load_tokenizer(config.output)
    return TrainTokenizerResult(
        tokenizer=str(config.output), tokens=len(tokenizer), sha256=tokenizer_sha256(tokenizer)
    )


def is_complete(folder: Path, asked: dict[str, object]) -> bool:
    """Whether a folder holds this tokenizer; refuse one that holds something else."""
    if not folder.exists():
        return False
    found = object_in(folder / RECORD) if (folder / RECORD).is_file() else {}
    if found == asked:
        return True
    name = next((k for k in asked if found.get(k) != asked[k]), RECORD)
    raise ValueError(
        f"{folder} exists with {name} {found.get(name)}, asked for is {asked.get(name)}; choose "
        "another --output or remove the folder"
    )
