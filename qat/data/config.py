"""How text becomes tokenizers, shards and blocks; imports no torch, so that help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qat.runtime.config import require_at_least, require_seed

Format = Literal["auto", "alpaca", "sharegpt", "messages", "dolly", "text"]
Thinking = Literal["none", "false", "true", "both", "all"]
LossOn = Literal["all", "assistant"]
TokenizerKind = Literal["sentencepiece-bpe", "sentencepiece-unigram", "byte-level-bpe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """How records become blocks."""

    format: Format = "auto"
    """What the records' fields mean; auto tells from the first record."""
    thinking: Thinking = "none"
    """The chat template's enable_thinking; both and all render each record several times, none
    joins the contents without a template."""
    seq_len: int = 64
    """Tokens a block."""
    loss_on: LossOn = "all"
    """Which tokens count."""
    num_sequences: int | None = None
    """Blocks at most, train and held-out together; all of the data when not given."""
    heldout_ratio: float = 0.125
    """Share of the blocks that is held out, by document."""
    seed: int = 0
    """Decides the held-out documents and every draw."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Plain text: where it is, and which field of a record holds it."""

    data: str
    """A json, jsonl, parquet or text file, a folder of them, or a hub data set as
    OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]; its train split when not given."""
    text_column: str = "text"
    """Field of a record that holds its text; records of other known formats are joined to one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTokenizerConfig(CorpusConfig):
    """Learn a tokenizer from text, as transformers loads it and GGUF files hold it."""

    output: Path
    """Folder of the tokenizer."""
    kind: TokenizerKind = "sentencepiece-bpe"
    """SentencePiece's BPE or unigrams, with bytes for unknown characters, or byte-level BPE."""
    vocab_size: int = 32_000
    """Tokens in all."""
    special_tokens: tuple[str, ...] = ()
    """Further tokens that no text gives, such as those of a chat template."""
    num_lines: int = 2_000_000
    """Lines to learn from at most, drawn evenly from all."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_seed(self)
        require_at_least(1, self, "num_lines")
        require_at_least(2, self, "vocab_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig(CorpusConfig):
    """Tokenize text once to binary shards that `qat pretrain` reads in any order."""

    tokenizer: str
    """Folder or hub name of the tokenizer; the shards keep a copy."""
    output_dir: Path
    """Folder of the shards."""
    heldout_ratio: float = 0.005
    """Share of the documents that is held out; a hash of its text decides about each."""
    shard_tokens: int = 1 << 26
    """Tokens of a shard: what a killed command loses at most of each file."""
    workers: int = 1
    """Processes, one file at a time each; the shards are the same for any number."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(1, self, "shard_tokens", "workers")
        if not 0 <= self.heldout_ratio < 1:
            raise ValueError(f"--heldout-ratio {self.heldout_ratio} is outside 0..1; try 0.005")
