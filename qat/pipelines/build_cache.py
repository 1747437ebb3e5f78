"""A teacher and a data set to a cache, which is found again where it exists."""

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat.cache.build import BuildRates, default_batch_size, find_built, write_cache
from qat.cache.config import BuildCacheConfig
from qat.cache.manifest import MANIFEST_FILE, CacheIdentity, default_name, expected_identity
from qat.data.blocks import Blocks
from qat.data.chat import ignores_thinking
from qat.data.records import source_name
from qat.data.text import read_blocks, require_known_ids
from qat.model.load import load_dense, load_tokenizer, model_identity, vocabulary_size
from qat.pipelines.place import Place
from qat.runtime.device import dtype_name
from qat.runtime.distributed import joined
from qat.runtime.launch import num_processes
from qat.storage.addresses import as_address, working_folder
from qat.storage.files import folder_lock
from qat.storage.mirror import Mirror, files_of, pushing
from qat.tracking.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildCacheResult:
    """A whole cache."""

    cache: Path
    """Its folder."""
    tokens: int
    """In all blocks."""
    bytes_per_token: float
    """Of the shards."""
    head_bytes: int
    """Of the teacher's output matrix; 0 where the content needs none."""
    tokens_per_second: float | None
    """Of this build; None where nothing was left to do, as in the field below."""
    bare_forward_tokens_per_second: float | None
    """Of the teacher's forward pass alone."""
    fingerprint: str
    """16 hex digits that name the cache."""


def build_cache(config: BuildCacheConfig) -> BuildCacheResult:
    """Build the cache, continue a build that was cut short, or find the whole cache."""
    data_name = source_name(config.data)  # first, so that a wrong path is reported at once
    place = Place.of(config)
    device, dtype = place.device, place.dtype
    tokenizer = load_tokenizer(config.teacher)
    named = model_identity(config.teacher)  # of files, so a whole cache is found without loading
    identity = expected_identity(
        config, tokenizer=tokenizer, teacher_weights=named["weights"], dtype=dtype_name(dtype)
    )
    name = config.name or default_name(identity, data_name)
    folder, mirror = place_of(config, name)
    if mirror:
        take_up(mirror)
    manifest, rates = find_built(folder, identity), BuildRates(None, None)
    if manifest:
        say(f"{folder} is already complete: nothing to do")
    else:
        has_modes = config.thinking != "none" and tokenizer.chat_template
        if has_modes and ignores_thinking(tokenizer):
            say(f"this chat template ignores enable_thinking: one text for {config.thinking}")
        blocks = read_all(config, tokenizer)
        require_known_ids(blocks.token_ids, vocabulary_size(config.teacher), config.teacher)
        say(describe_blocks(blocks, identity))
        teacher = load_dense(config.teacher, dtype=dtype)
        device.place(teacher)
        batch_size = config.batch_size or default_batch_size(device, config.seq_len)
        with joined(device), pushing(mirror) if mirror else nullcontext():
            manifest, rates = write_cache(
                teacher,
                blocks,
                identity,
                folder,
                teacher_name=named["name"],
                data_name=data_name,
                batch_size=batch_size,
                device=device,
            )
    if mirror:
        mirror.push(files_of(folder))
        say(f"copied to {mirror.address}")
    return BuildCacheResult(
        cache=folder,
        tokens=manifest.num_tokens,
        bytes_per_token=manifest.bytes_per_token,
        head_bytes=manifest.head_bytes,
        fingerprint=manifest.fingerprint,
        **asdict(rates),
    )


def place_of(config: BuildCacheConfig, name: str) -> tuple[Path, Mirror | None]:
    """Return the folder of a cache here, and its copy where the output is an address.

    Raises:
        ValueError: If several processes write to an address.
    """
    address = as_address(config.output_dir)
    if address is None:
        return config.output_dir / name, None
    if num_processes() > 1:
        raise ValueError(
            f"--output-dir {address} with torchrun: build the cache in a folder, then `qat push` it"
        )
    folder = working_folder(f"{address}/{name}", "caches")
    return folder, Mirror(folder, f"{address}/{name}")


def take_up(mirror: Mirror) -> None:
    """Bring what lies at an address where it is further than the folder here, or that is gone."""

    def how_far(names: Collection[str]) -> tuple[bool, int]:
        return MANIFEST_FILE in names, sum(name.startswith("shard_") for name in names)

    with folder_lock(mirror.folder):
        mirror.bring(lambda there, here: how_far(there) > how_far(here))


def read_all(config: BuildCacheConfig, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """Return the blocks that the teacher reads and those that it does not, held-out ones last."""
    if not config.text_sequences:
        return read_blocks(config.data, tokenizer, config)
    num_blocks = config.num_sequences + config.text_sequences
    ratio = config.heldout_ratio * config.num_sequences / num_blocks  # of what the teacher reads
    plan = replace(config, num_sequences=num_blocks, heldout_ratio=ratio)
    return read_blocks(config.data, tokenizer, plan)


def describe_blocks(blocks: Blocks, identity: CacheIdentity) -> str:
    """Return one line on the blocks and how they begin."""
    start = "" if identity.block_start == "none" else f", BOS ({identity.block_start_id}) first"
    held_out, read = blocks.num_heldout, min(len(blocks), identity.max_sequences or len(blocks))
    return (
        f"{len(blocks)} blocks of {identity.seq_len} tokens{start}, {held_out} held out, {read} "
        f"read by the teacher; documents {identity.documents}"
    )
