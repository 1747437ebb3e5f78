"""Flags of `qat compress` and `qat frontier`; imports no torch, so that help is quick."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qat.pipelines.quantize_config import Fit
from qat.runtime.config import PlaceConfig, require_at_least, require_seed

Target = Literal["gguf", "mlx", "compressed-tensors", "hf-quantized", "coreml"]
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20}
UNITS["gib"] = 2**30
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmg]?i?b?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that a size such as 60MB (10**6) or 57.2MiB (2**20) stands for.

    Raises:
        ValueError: If it is none.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match and match["unit"].lower()
    if match is None or unit not in UNITS:
        raise ValueError(f"size {text!r} is none; write a number of bytes, 60MB or 57.2MiB")
    return int(float(match["number"]) * UNITS[unit])


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(PlaceConfig):
    """The model, the text that decides, and where to compute."""

    model: str
    """Hugging Face folder or hub name of the full-precision model: the teacher."""
    data: str
    """Text that calibrates, trains and validates: a json, jsonl, parquet or text file, a folder of
    them, or a hub name. The likeness of what the file will be used for."""
    to: Target = "gguf"
    """Whose formats the file may use. gguf: llama.cpp and its kin. mlx: mlx-lm. compressed-tensors:
    transformers and vLLM. hf-quantized: transformers with `qat.export.plugin`. coreml: palettes."""
    seq_len: int = 64
    """Tokens a block."""
    num_sequences: int | None = None
    """Blocks of the data to use at most, those that a fit alone reads among them; as many as the
    minutes are enough for when not given."""
    eval_text: Path | None = None
    """Another text that the finished file is measured on, once; the validation part of the data
    when not given."""
    eval_sequences: int = 64
    """Blocks of a measurement."""
    minutes: float = 30.0
    """Time for a file; training takes what the other stages leave. On a CPU formats of vector grids
    (IQ2, IQ3) are tried from 15 minutes on, and stay as they are fitted. 0 = no training."""
    fit: Fit = "hessian"
    """hessian: against all inputs, layer by layer, on much text. moments: by each input's mean
    square, an order quicker, for a look at sizes; `qat frontier` with --minutes 0 then measures
    students in memory and writes no files."""
    batch_size: int = 16
    """Sequences of a training step."""
    lr: float = 0.005
    """Peak learning rate of latent weights, as a share of their rounding errors (rms)."""
    seed: int = 0
    """Decides the order of the data and every draw."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_seed(self)
        require_at_least(2, self, "seq_len", "eval_sequences")
        require_at_least(1, self, "batch_size", "num_sequences")
        require_at_least(0, self, "minutes")
        if self.lr <= 0:
            raise ValueError(f"--lr {self.lr} must be above 0; try 0.005")

    @property
    def is_quick(self) -> bool:
        """Whether a look is asked for, not files."""
        return self.fit == "moments" and not self.minutes


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressConfig(SourceConfig):
    """Make the best file of a size: choose formats, fit, train, export, measure what was written.

    Give one of --size, --bits-per-weight and --kl. A killed run continues with the same flags.
    """

    output: Path
    """The file (gguf) or folder to write; must not exist."""
    work: Path | None = None
    """Where stages are kept: the output's name with .work when not given. Files of several sizes
    of one model and text may share it; it may be removed at the end."""
    size: str | None = None
    """Largest file, such as 60MB (10**6 bytes) or 57.2MiB."""
    bits_per_weight: float | None = None
    """Size of the file as bits per parameter of the model, everything in it counted."""
    kl: float | None = None
    """Make the smallest file whose validation KL is at most this before it is trained, in nats."""

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other, and values out of range."""
        SourceConfig.__post_init__(self)
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("size", "bits_per_weight", "kl")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'no size'} given; give one of --size 60MB, "
                "--bits-per-weight 3.0 and --kl 0.1"
            )
        if self.size is not None:
            parse_size(self.size)
        for name in ("bits_per_weight", "kl"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")

    @property
    def work_folder(self) -> Path:
        """Where stages are kept."""
        return self.work or self.output.with_name(f"{self.output.name}.work")


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierConfig(SourceConfig):
    """Show the best KL of many sizes, next to files of other programs: table, plot, HTML page."""

    output: Path
    """Folder of the report: frontier.md, frontier.png, frontier.html, frontier.jsonl."""
    sizes: str
    """Sizes joined by commas, such as 45MB,54MB,60MB."""
    peers: Path | None = None
    """Folder of .gguf files of other programs, measured in the same way."""
    stock: str = ""
    """Quantizations that ik_llama.cpp makes of the model, with an importance matrix of the same
    text, as peers: IQ4_NL,IQ3_XXS,Q4_K/q6_k, where a slash names the type of the embedding (iq4_nl
    if none does). Takes `pip install ik-llama-cpp-python`."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        SourceConfig.__post_init__(self)
        self.budgets()

    def budgets(self) -> list[int]:
        """Return the sizes in bytes, ascending."""
        return sorted(parse_size(part) for part in self.sizes.split(","))
