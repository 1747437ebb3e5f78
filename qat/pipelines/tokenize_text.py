"""Text to shards of token ids: parallel by file, in the same order for any number of workers."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qat.data.config import TokenizeConfig
from qat.data.records import source_files, source_name, source_revision
from qat.data.text import bos_id, tokenizer_sha256, vocabulary_size
from qat.data.token_dataset import TokenDataset
from qat.data.token_shards import (
    BUILDING_FILE,
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    TokenIdentity,
    TokenManifest,
    TokenShard,
    read_identity,
    read_manifest,
    require_identity,
    write_manifest,
)
from qat.data.token_writer import Source, tokenize_source
from qat.model.load import load_tokenizer, save_tokenizer
from qat.storage.files import (
    atomic_folder,
    folder_lock,
    sha256_of_file,
    sweep_leftovers,
    write_json,
)
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeResult:
    """Whole shards."""

    shards: str
    """Their folder."""
    fingerprint: str
    """16 hex digits that name them."""
    files: int
    documents: int
    tokens: int
    """Of training documents."""
    heldout_tokens: int
    bytes: int


def tokenize(config: TokenizeConfig) -> TokenizeResult:
    """Write the shards of a data source, continue a command that was cut short, or find them whole.

    Raises:
        ValueError: If the folder holds other shards, or a record has no text.
        FileNotFoundError: If there is no such data or tokenizer.
    """
    names = [str(file) for file in source_files(config.data)] or [config.data]
    tokenizer = load_tokenizer(config.tokenizer)
    identity = token_identity(config, names, tokenizer)
    folder = config.output_dir
    with folder_lock(folder):
        check_folder(folder, identity)
        if (folder / MANIFEST_FILE).is_file():
            say(f"{folder} is already complete: nothing to do")
        else:
            write_json(folder / BUILDING_FILE, asdict(identity))
            with atomic_folder(folder / TOKENIZER_FOLDER) as copy:
                save_tokenizer(tokenizer, copy)
            manifest = TokenManifest(
                identity=identity,
                data_name=source_name(config.data),
                vocab_size=vocabulary_size(tokenizer),
                shards=tuple(write_sources(folder, identity, names, config.workers)),
            )
            finish(folder, manifest)
    return result_of(TokenDataset.open(folder))


def token_identity(
    config: TokenizeConfig, names: list[str], tokenizer: PreTrainedTokenizerBase
) -> TokenIdentity:
    """Return what decides the shards that a config asks for."""
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no eos_token; set it in tokenizer_config.json")
    files = source_files(config.data)
    return TokenIdentity(
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        data=tuple(map(sha256_of_file, files)) or tuple(map(source_revision, names)),
        text_column=config.text_column,
        heldout_ratio=config.heldout_ratio,
        shard_tokens=config.shard_tokens,
        bos_id=bos_id(tokenizer),
        separator_id=tokenizer.eos_token_id,
    )


def check_folder(folder: Path, identity: TokenIdentity) -> None:
    """Refuse a folder that holds other shards, whole or not."""
    if (folder / MANIFEST_FILE).is_file():
        require_identity(read_manifest(folder).identity, identity, folder)
    elif (folder / BUILDING_FILE).is_file():
        require_identity(read_identity(folder / BUILDING_FILE), identity, folder)


def write_sources(
    folder: Path, identity: TokenIdentity, names: list[str], workers: int
) -> Iterator[TokenShard]:
    """Write what is missing of each source; yield the entries of all, by source."""
    sources = [
        Source(name=name, index=index, folder=folder, identity=identity)
        for index, name in enumerate(names)
    ]
    with tqdm(total=len(sources), desc="tokenize", unit="file") as bar:
        for shards in each_source(sources, folder / TOKENIZER_FOLDER, min(workers, len(sources))):
            bar.update()
            yield from shards


def each_source(sources: list[Source], tokenizer: Path, workers: int) -> Iterator[list[TokenShard]]:
    """Yield the shards of each source in order, written by so many processes."""
    if workers == 1:
        yield from map(partial(tokenize_source, tokenizer=load_tokenizer(tokenizer)), sources)
        return
    context = multiprocessing.get_context("spawn")  # the fork of a process of threads may wait
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(partial(tokenize_in_process, tokenizer), sources)


def tokenize_in_process(tokenizer: Path, source: Source) -> list[TokenShard]:
    """Tokenize a source in one of several processes, of one thread each."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return tokenize_source(source, load_tokenizer(tokenizer))


def finish(folder: Path, manifest: TokenManifest) -> None:
    """Declare shards whole and remove what told how far they were; refuse shards without text."""
    if not sum(shard.num_tokens for shard in manifest.shards):
        raise ValueError(f"--data {manifest.data_name} gives no training tokens; give more text")
    write_manifest(folder, manifest)
    (folder / BUILDING_FILE).unlink()
    for leftover in folder.glob("progress_*.json"):
        leftover.unlink()
    sweep_leftovers(folder)


def result_of(tokens: TokenDataset) -> TokenizeResult:
    """Return the numbers of whole shards."""
    shards = tokens.manifest.shards
    return TokenizeResult(
        shards=str(tokens.folder),
        fingerprint=tokens.fingerprint,
        files=len(shards),
        documents=sum(shard.num_documents for shard in shards),
        tokens=tokens.num_tokens("train"),
        heldout_tokens=tokens.num_tokens("heldout"),
        bytes=sum(shard.num_bytes for shard in shards),
    )
