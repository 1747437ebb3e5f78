"""Flags of `qat evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path

from qat.runtime.config import PlaceConfig, require_at_least, split_list
from qat.storage.addresses import TAKES_ADDRESS


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(PlaceConfig):
    """Measure a student on a cache's held-out split, or any model on texts and tasks."""

    checkpoint: str
    """Native folder, run folder (its best), `.pt` file with its config.json, a model folder, or
    any program's `.gguf` file."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint: folder or hub name; the one its config names. A
    `.gguf` file needs it."""
    cache_dir: Path | None = field(default=None, metadata=TAKES_ADDRESS)
    """Teacher cache to measure on: its held-out split."""
    teacher: str | None = None
    """Full-precision model to compare with: kl_nats is then over its whole vocabulary, also on a
    cache that keeps a part of it."""
    text: Path | None = None
    """Plain text file to measure on."""
    perplexity: tuple[str, ...] = ()
    """Texts to measure perplexity on, NAME=SOURCE or SOURCE each: json, jsonl, parquet or text
    files, folders or hub names, such as wiki=Salesforce/wikitext:wikitext-2-raw-v1:test; wikitext
    for that one, c4 for 256 windows of allenai/c4:en:validation. A #COLUMN at the end takes the
    place of --text-column. Documents are joined by an empty line."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, such as arc_easy,hellaswag or mmlu_*, or YAML files of tasks; needs the
    package lm-eval."""
    num_fewshot: int | None = None
    """Solved examples in each prompt of --tasks; as each task says when not given."""
    text_column: str = "text"
    """Field of records that holds text, for --perplexity."""
    window: int = 1024
    """Tokens of a window of --perplexity, BOS included; its first token is context."""
    stride: int | None = None
    """Tokens between the starts of windows, of which only new tokens count; half a window when not
    given, all of it for disjoint windows."""
    seq_len: int = 64
    """Tokens of a block of --text."""
    num_sequences: int | None = None
    """Sequences, blocks or questions of a task at most; all when not given."""
    batch_size: int = 16
    """Sequences of a forward pass."""

    def __post_init__(self) -> None:
        texts = self.text is not None, bool(self.perplexity)
        if sum((self.cache_dir is not None, *texts, bool(self.tasks))) != 1:
            raise ValueError(
                "give one of --cache-dir, --text, --perplexity and --tasks to measure on"
            )
        if self.teacher and (self.perplexity or self.tasks):
            flag = "--perplexity" if self.perplexity else "--tasks"
            raise ValueError(f"{flag} needs no teacher; leave out --teacher, or use --text")
        if self.num_fewshot is not None and not self.tasks:
            raise ValueError(f"--num-fewshot {self.num_fewshot} is of --tasks; name tasks as well")
        require_at_least(0, self, "num_fewshot")
        require_at_least(1, self, "num_sequences", "batch_size", "stride")
        require_at_least(2, self, "seq_len", "window")

    @property
    def used_stride(self) -> int:
        """Return the tokens between the starts of windows."""
        return self.window // 2 if self.stride is None else self.stride

    @property
    def task_names(self) -> tuple[str, ...]:
        """Return the tasks one by one."""
        return split_list(self.tasks)
