"""What `qat parity` can be told."""

from dataclasses import dataclass, field
from pathlib import Path

from qat.runtime.config import require_at_least, require_seed
from qat.storage.addresses import TAKES_ADDRESS


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig:
    """Run an exported file in its runtime; compare logits and greedy answers with the student."""

    checkpoint: str
    """The student that was exported: native folder, run folder or `.pt` file."""
    export: Path
    """What `qat export` wrote: a folder or a .gguf file."""
    prompts: Path
    """Text file, one prompt a line."""
    seed: int = 0
    """Which prompts are drawn where the file has more than are asked for."""
    num_prompts: int = 8
    """Prompts compared."""
    num_new_tokens: int = 16
    """Tokens of each greedy answer."""
    cache_dir: Path | None = field(default=None, metadata=TAKES_ADDRESS)
    """Teacher cache: held-out numbers of the runtime next to those of the student."""
    num_sequences: int = 64
    """Held-out sequences measured; those of PyTorch are in float32."""
    model_id: str | None = None
    """Full-precision model of a `.pt` checkpoint: folder or hub name; the one its config names."""

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        require_seed(self)
        require_at_least(1, self, "num_prompts", "num_new_tokens", "num_sequences")
