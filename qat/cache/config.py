"""Settings of the commands on caches; imports no torch, so that help is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from qat.data.config import TextConfig
from qat.runtime.config import require_at_least
from qat.storage.addresses import TAKES_ADDRESS
from qat.storage.files import require_plain_name

Content = Literal["top-k", "sampled", "hidden"]
DEFAULT_TOP_K = {"top-k": 64, "sampled": 8, "hidden": 0}
# With 8 exact ids this is 96 bytes a token where ids take 4 bytes: below the bar of 100.
NUM_DRAWS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildCacheConfig(TextConfig):
    """Write the teacher's logits on a data set, once, for every student to learn from."""

    teacher: str
    """Hugging Face folder or hub name of the teacher."""
    data: str
    """A json, jsonl, parquet or text file, a folder of them, or a hub name (name@revision)."""
    content: Content = "top-k"
    """top-k: likeliest ids and tail mass. sampled: few ids and unbiased tail draws. hidden: the
    final hidden state in int8, from which all logits follow."""
    top_k: int | None = None
    """Ids kept exactly at each position; 64 for top-k, 8 for sampled."""
    num_negatives: int = 0
    """Uniformly drawn ids at each position in addition to the content."""
    batch_size: int | None = None
    """Blocks a forward pass; chosen for the device when not given."""
    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu."""
    text_sequences: int = 0
    """Further training blocks at most, kept as token ids alone: a fit calibrates on them, too. The
    teacher does not read them. Takes --num-sequences, which does not count them."""
    dtype: str = "auto"
    """The teacher's dtype: auto, fp32, bf16 or fp16; auto is bf16 where the device has it."""
    output_dir: Path = field(default=Path("caches"), metadata=TAKES_ADDRESS)
    """Where the cache's folder is made; at an address, such as s3://bucket/caches, from one in
    caches that is copied there while it grows."""
    name: str | None = None
    """The folder's name; made of the settings and the fingerprint when not given."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.name is not None:
            require_plain_name(self.name, "--name")
        require_at_least(2, self, "seq_len")
        require_at_least(1, self, "num_sequences", "batch_size")
        require_at_least(0, self, "num_negatives", "text_sequences")
        if self.text_sequences and self.num_sequences is None:
            raise ValueError("--text-sequences needs --num-sequences: what the teacher reads")
        if not 0 <= self.heldout_ratio < 1:
            raise ValueError(f"--heldout-ratio {self.heldout_ratio} is outside 0..1; try 0.125")
        if self.content == "hidden" and (self.top_k or self.num_negatives):
            raise ValueError(
                "--content hidden keeps no ids: full logits follow from it; "
                "leave out --top-k and --num-negatives"
            )
        if self.content != "hidden":
            require_at_least(1, self, "top_k")

    @property
    def kept_ids(self) -> int:
        """Ids kept exactly at each position."""
        return DEFAULT_TOP_K[self.content] if self.top_k is None else self.top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectCacheConfig:
    """Show what a cache holds; its shards are checked on the way."""

    cache: Positional[Path] = field(metadata=TAKES_ADDRESS)
    """The cache's folder, native or of the form meta.json and shard_*.pt, or its address."""
    teacher: str | None = None
    """Folder or hub name whose tokenizer decodes the sample; ids are shown without it."""
    sequence: int = 0
    """The sequence that is shown."""
    plot: Path | None = None
    """Image file for tail mass, probability by rank and bytes by field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertCacheConfig:
    """Convert a cache of meta.json and shard_*.pt to ours: checked, memory-mapped, smaller."""

    source: Positional[Path]
    """The cache's folder: meta.json and shard_*.pt, also nested in a folder."""
    target: Positional[Path]
    """The folder to make."""
